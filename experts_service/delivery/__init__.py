"""Rows to replicas and answers back, through late, lost and wrong ones: one state machine. Knows no bytes."""
