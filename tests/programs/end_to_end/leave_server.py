"""Starts what a test would start as a server, says its id once it ends with us, and waits to be killed."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ENDS_WITH_US
from tests.waiting import wait_for

server = subprocess.Popen([*ENDS_WITH_US, "sleep", "999"], stdout=subprocess.DEVNULL)
# Before setpriv has become what it starts, it may not have asked yet to end with us.
wait_for(lambda: Path(f"/proc/{server.pid}/cmdline").read_bytes().startswith(b"sleep"), 60, "the server's start")
print(server.pid, flush=True)
sys.stdin.read()
