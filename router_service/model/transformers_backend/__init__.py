"""Decoders whose code is transformers': attention reads our pages, experts are reached by our dispatcher.

One microbatch at a time: the model's code cannot be left while it waits for experts, so a step of several is computed
one after the other. It does not know how to keep anything but keys and values of softmax attention for a sequence:
linear attention, state spaces and convolutions over tokens are refused by name before a weight is read. It does not
know softcapped scores, masks that a model makes itself, pictures or sound, rotary embeddings that change with the
length of a sequence, quantised weights or captured steps. Kernels of ours multiply and attend where they can.
"""
