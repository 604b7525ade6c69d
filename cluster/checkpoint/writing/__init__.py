"""New checkpoints: what their files hold, and how they get there whole or not at all. Computes no weight."""
