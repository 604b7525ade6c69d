"""Starts what a test would start as a server, says its id, and waits to be killed."""

import subprocess
import sys

from tests.conftest import ENDS_WITH_US

print(subprocess.Popen([*ENDS_WITH_US, "sleep", "99"]).pid, flush=True)
sys.stdin.read()
