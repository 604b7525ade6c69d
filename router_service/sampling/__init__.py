"""Logits to token ids, all rows at once, random numbers keyed by position. Knows no model."""
