"""Who may ask how much: keys, callers, limits, bills, bytes held. Knows no model and no wire."""
