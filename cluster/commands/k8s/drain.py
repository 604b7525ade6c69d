"""`manta k8s drain`: what a pod does before it stops. Tells Ray that its node goes, waits until nothing needs it.

Serve then starts replacements elsewhere, sends nothing new here, and lets replicas end what they stream. HAProxy of
this pod may carry streams of gateways in other pods, so it is waited for, too. The head goes last: where the whole
cluster is taken away, it stays while others drain.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from typing import Any

import httpx

from cluster.commands.cluster_connection import DEADLINE_S, look_at_cluster
from cluster.ray_variables import PORTS

POLL_S = 1.0
RAY_MARGIN_S = 30.0  # Ray's own deadline for the node comes so much later
ALL_TOLD_S = 15.0  # until every pod of a cluster that is taken away has told Ray so
STATS_URL = f"http://127.0.0.1:{PORTS['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv"


def run(timeout_s: float, address: str = "auto", node_id: str | None = None, stats_url: str = STATS_URL) -> bool:
    """Whether nothing needs the node any more; False when time is over. None: the node that we are on.

    Raises what look_at_cluster raises.
    """
    deadline = time.monotonic() + timeout_s
    return look_at_cluster(address, lambda _: _drain(deadline, node_id, stats_url), deadline_s=timeout_s + DEADLINE_S)


def _drain(deadline: float, node_id: str | None, stats_url: str) -> bool:
    import ray

    node_id = node_id or str(ray.get_runtime_context().get_node_id())
    if _is_head(node_id):
        time.sleep(min(ALL_TOLD_S, max(0.0, deadline - time.monotonic())))
        return _wait(lambda: bool(ray._private.state.state.get_draining_nodes()), deadline)
    _tell_ray(node_id, deadline)
    return _wait(lambda: bool(replicas_on(node_id) or streams_of_haproxy(stats_url)), deadline)


def _wait(needed: Callable[[], bool], deadline: float) -> bool:
    while needed():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _is_head(node_id: str) -> bool:
    import ray

    return any(node["NodeID"] == node_id and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def _tell_ray(node_id: str, deadline: float) -> None:
    """Ray places nothing here any more. What it ends itself it ends later than we do."""
    import ray
    from ray.core.generated import autoscaler_pb2

    ends_ms = int((time.time() + deadline - time.monotonic() + RAY_MARGIN_S) * 1000)
    gcs: Any = ray._private.worker.global_worker.gcs_client  # what `ray drain-node` asks
    gcs.drain_node(node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "the pod is being stopped", ends_ms)


def replicas_on(node_id: str) -> list[str]:
    """Serve's replicas on that node; one that has no place yet is on none."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return []
    return [
        replica["replica_id"]
        for application in client.get_serve_details()["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node_id
    ]


def streams_of_haproxy(stats_url: str) -> int:
    """Requests that this pod's HAProxy has open at gateways; 0 where none runs."""
    try:
        text = httpx.get(stats_url, timeout=2.0).text
    except httpx.HTTPError:
        return 0
    rows = csv.DictReader(text.lstrip("# ").splitlines())
    return sum(int(row["scur"] or 0) for row in rows if row["svname"] not in ("FRONTEND", "BACKEND"))
