"""A fleet under simulated time, run by the product's own decisions. Knows no tensor, no Ray and no wall clock.

Nothing of the product imports this; only a command and tests do.
"""
