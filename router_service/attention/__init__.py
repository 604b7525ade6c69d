"""Attention over the paged KV cache, and how large the cache is. Knows tensors and blocks; knows no sequence."""
