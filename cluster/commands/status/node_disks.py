"""How full the disk with Ray's session is on each node: its logs lie there, and what it spills. Knows nothing of Serve.

The machine that looks answers for itself. On each other node a task is started, which may not come on a busy one.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any


def used_share(directory: str) -> float:
    """Of the file system of `directory`, as Ray counts it before it spills; 1 is full."""
    usage = shutil.disk_usage(directory)
    return 1 - usage.free / usage.total if usage.total else 0.0


def ask_disks() -> dict[Any, str]:
    """The tasks that look at other nodes, with their nodes' ids. Started before others are asked, read afterwards."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_session_disk)
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in others
    }


def disks(asked: dict[Any, str], timeout_s: float) -> dict[str, float]:
    """The used share by node id, of those that answer in time."""
    import ray

    told = {}
    with suppress(OSError):
        told[ray.get_runtime_context().get_node_id()] = _session_disk()
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    for one in answered:
        with suppress(ray.exceptions.RayError, OSError):
            told[asked[one]] = ray.get(one)
    return told


def _session_disk() -> float:
    """Of the node where this process of Ray runs; each may have a folder of its own."""
    import ray

    node: Any = ray._private.worker._global_node
    return used_share(node.get_session_dir_path())
