"""Makes a host with a process in it, says its id, and waits to be killed."""

import sys

from tests.hosts import hosts

with hosts(1) as (host,):
    print(host.start(["sleep", "99"], stdout=2).pid, flush=True)
    sys.stdin.read()
