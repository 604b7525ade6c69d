"""`manta k8s drain`: what a pod does before it stops. Tells Ray that its node goes, waits until nothing needs it.

Serve then starts replacements elsewhere, sends nothing new here, and lets replicas end what they stream. HAProxy of
this pod may carry streams of gateways in other pods, so it is waited for, too. The head goes last: where the whole
cluster is taken away, it stays while others drain.

Where Ray or Serve's controller does not answer, nobody knows what streams, and nothing is started elsewhere. So the pod
stays while replicas of Serve run in it, until it is answered or time is over.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import httpx

from cluster.commands.cluster_connection import JoinedCluster, watch_cluster
from cluster.commands.serve_controller import details
from cluster.errors import Unavailable
from cluster.ray_variables import PORTS

POLL_S = 1.0
STEP_S = 10.0  # for Ray's GCS, for joining, and for each look
AGAIN_S = 10.0  # until what did not answer is asked again, which takes seconds of CPU
RAY_MARGIN_S = 30.0  # Ray's own deadline for the node comes so much later
ALL_TOLD_S = 15.0  # until every pod of a cluster that is taken away has told Ray so
STATS_URL = f"http://127.0.0.1:{PORTS['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv"


def run(
    timeout_s: float,
    address: str = "auto",
    node_id: str | None = None,
    stats_url: str = STATS_URL,
    say: Callable[[str], object] = print,
) -> bool:
    """Whether nothing needs the node any more; False when time is over. None: the node that we are on.

    `say` is called with what does not answer. Raises SetupError for an address of another form.
    """
    told_until, ends_at = time.monotonic() + ALL_TOLD_S, time.monotonic() + timeout_s
    said = ""
    while True:
        try:
            look = partial(_is_needed, node_id=node_id, told_until=told_until, ends_at=ends_at)
            with closing(watch_cluster(address, look, POLL_S, STEP_S)) as looks:
                for is_needed in looks:
                    if not (is_needed or streams_of_haproxy(stats_url)):
                        return True
                    if time.monotonic() > ends_at:
                        return False
        except Unavailable as error:
            if said != error.message:
                said = error.message
                say(f"{said}. Meanwhile nothing is started elsewhere; this pod stays while replicas of Serve run in it")
        if not (serve_runs_here() or streams_of_haproxy(stats_url)):
            return True
        if time.monotonic() > ends_at:
            return False
        time.sleep(max(0.0, min(AGAIN_S, ends_at - time.monotonic())))


def _is_needed(_: JoinedCluster, node_id: str | None, told_until: float, ends_at: float) -> bool:
    """Tells Ray that the node goes, each time. Raises Unavailable where Serve's controller does not answer."""
    import ray

    node_id = node_id or str(ray.get_runtime_context().get_node_id())
    if _is_head(node_id):
        return time.monotonic() < told_until or bool(ray._private.state.state.get_draining_nodes())
    _tell_ray(node_id, ends_at)
    return bool(replicas_on(node_id))


def _is_head(node_id: str) -> bool:
    import ray

    return any(node["NodeID"] == node_id and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def _tell_ray(node_id: str, ends_at: float) -> None:
    """Ray places nothing here any more. What it ends itself it ends later than we do."""
    import ray
    from ray.core.generated import autoscaler_pb2

    ends_ms = int((time.time() + ends_at - time.monotonic() + RAY_MARGIN_S) * 1000)
    gcs: Any = ray._private.worker.global_worker.gcs_client  # what `ray drain-node` asks
    gcs.drain_node(node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "the pod is being stopped", ends_ms)


def replicas_on(node_id: str) -> list[str]:
    """Serve's replicas on that node; one that has no place yet is on none. Raises Unavailable."""
    return [
        replica["replica_id"]
        for application in details()["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node_id
    ]


def serve_runs_here() -> bool:
    """Whether this machine, or pod, has processes of Serve's replicas, whatever Ray knows of them."""
    import psutil

    lines = (one.info["cmdline"] or [""] for one in psutil.process_iter(["cmdline"]))
    return any(line[0].startswith("ray::ServeReplica") for line in lines)


def streams_of_haproxy(stats_url: str) -> int:
    """Requests that this pod's HAProxy has open at gateways; 0 where none runs."""
    try:
        text = httpx.get(stats_url, timeout=2.0).text
    except httpx.HTTPError:
        return 0
    rows = csv.DictReader(text.lstrip("# ").splitlines())
    return sum(int(row["scur"] or 0) for row in rows if row["svname"] not in ("FRONTEND", "BACKEND"))
