"""Claims the port of its argument, or another, says which, and keeps it until its input ends."""

import sys

from cluster.commands.local_ray.ray_environment import _free_port

print(_free_port(int(sys.argv[1])), flush=True)
sys.stdin.read()
