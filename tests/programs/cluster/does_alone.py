"""A driver that does something which one process at a time may do, until it is killed. Arguments: address, what."""

import sys
import time

import ray

from cluster.commands.one_at_a_time import one_at_a_time

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
with one_at_a_time(sys.argv[2]):
    print("in", flush=True)
    time.sleep(600)
