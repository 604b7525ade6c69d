"""`manta doctor`: looks whether this machine can serve, one file a group of checks. Starts no Ray, serves nothing."""

from __future__ import annotations

from pathlib import Path

NVIDIA = Path("/dev/nvidiactl")  # the driver makes it
