"""What Triton compiles for GPUs, and what starts it. Knows tensors on a device; knows no layer, and never the host."""
