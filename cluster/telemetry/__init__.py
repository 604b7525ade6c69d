"""What every process tells of itself: metrics, traces, loading progress, blocked event loops.

Knows no engine and no door.
"""
