"""A Ray of our own on this machine: its variables, its files and its start. Knows nothing of Serve and of models."""
