"""Grammars: a schema becomes rules, rules a mask of the vocabulary. Knows no tensor but the mask, no request."""
