"""The maths of experts on whatever device: linear layers, SwiGLU, threads. Knows tensors; knows no wire."""
