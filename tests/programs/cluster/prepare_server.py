"""Prepares the files of a server, says where those of HAProxy are, and lives until its input ends."""

import os
import sys

from cluster.commands.local_ray.ray_environment import prepare_server

prepare_server()
print(os.path.dirname(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]), flush=True)
sys.stdin.read()
