"""How full the disk with Ray's session is on each node: its logs lie there, and what it spills. Knows nothing of Serve.

The machine that looks answers for itself. On each other node a task is started, which may not come on a busy one.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any

from cluster.commands.each_node import Asked, ask_nodes, heard


def used_share(directory: str) -> float:
    """Of the file system of `directory`, as Ray counts it before it spills; 1 is full."""
    usage = shutil.disk_usage(directory)
    return 1 - usage.free / usage.total if usage.total else 0.0


def ask_disks() -> Asked:
    """The tasks that look at other nodes, with their nodes' ids. Started before others are asked, read afterwards."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return ask_nodes(others, _session_disk)


def disks(asked: Asked, timeout_s: float) -> dict[str, float]:
    """The used share by node id, of those that answer in time."""
    import ray

    told: dict[str, float] = heard(asked, timeout_s)
    with suppress(OSError):
        told[ray.get_runtime_context().get_node_id()] = _session_disk()
    return told


def _session_disk() -> float:
    """Of the node where this process of Ray runs; each may have a folder of its own."""
    import ray

    node: Any = ray._private.worker._global_node
    return used_share(node.get_session_dir_path())
