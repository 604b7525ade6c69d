"""Sequences, blocks and the order of steps, as plain data. Knows no tensor and no clock but the one it is given."""
