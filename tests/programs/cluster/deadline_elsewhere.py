"""What is left of a pickled deadline on a host whose clocks are others: an hour ahead, and up a hundred days longer."""

# ruff: noqa: E402
import sys
import time

now, since_boot = time.time, time.monotonic
time.time = lambda: now() + 3600
time.monotonic = lambda: since_boot() + 8_640_000

import pickle

deadline = pickle.load(sys.stdin.buffer)
print(deadline.remaining_s, deadline.at - time.monotonic())
