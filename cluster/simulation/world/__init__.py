"""Simulated time, processes that die and stop, and the network between them. Knows nothing of what they do."""
