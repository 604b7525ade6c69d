"""`manta k8s drain`: what a pod does before it stops. Tells Ray that its node goes, waits until nothing needs it.

Serve then starts replacements elsewhere, sends nothing new here, and lets replicas end what they stream. HAProxy of
this pod may carry streams of gateways in other pods, so it is waited for, too.

Where the whole cluster is taken away, nothing can be started elsewhere, and Serve ends no replica. Its pods go in this
order, once the head was told to go and every other node drains:

    those with gateways ─▶ once no gateway has a request      coordinators, experts ─▶ once no gateway is left
                                                              the head ─▶ once no other node drains

A watch of health is a request as well, for as long as its client likes. So the gateways are told to end theirs.

Where Ray or Serve's controller does not answer, nobody knows what streams, and nothing is started elsewhere. So the pod
stays while replicas of Serve run in it, until it is answered or time is over.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from cluster.commands.cluster_connection import JoinedCluster, watch_cluster
from cluster.commands.serve_controller import details
from cluster.commands.status.cluster_snapshot import GATEWAY
from cluster.errors import MantaError, SetupError
from cluster.ray_variables import PORTS

POLL_S = 1.0
STEP_S = 10.0  # for Ray's GCS, for joining, and for each look
AGAIN_S = 10.0  # until what did not answer is asked again, which takes seconds of CPU
REQUESTS_TIMEOUT_S = 2.0  # for gateways to say whether they have any
ALL_TOLD_S = 15.0  # until every pod of a cluster that is taken away has told so, and no client is sent to it any more
_NAMESPACE, _HEAD_THAT_GOES = b"manta_drain", b"head"  # its node's id: another head may find there what Redis kept
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
            look = partial(_is_needed, node_id=node_id, told_until=told_until)
            with closing(watch_cluster(address, look, POLL_S, STEP_S)) as looks:
                for is_needed in looks:
                    if not (is_needed or streams_of_haproxy(stats_url)):
                        return True
                    if time.monotonic() > ends_at:
                        return False
        except SetupError:
            raise
        except Exception as error:  # of any kind: a hook that fails has the pod ended at once, with its streams
            why = error.message if isinstance(error, MantaError) else f"a look at the cluster failed: {error!r}"
            if said != why:
                said = why
                say(f"{said}. Meanwhile nothing is started elsewhere; this pod stays while replicas of Serve run in it")
        if not (serve_runs_here() or streams_of_haproxy(stats_url)):
            return True
        if time.monotonic() > ends_at:
            return False
        time.sleep(max(0.0, min(AGAIN_S, ends_at - time.monotonic())))


@dataclass(frozen=True, slots=True)
class Nodes:
    """Those of the Ray cluster that live, by id."""

    heads: frozenset[str]  # one; while another takes over, none or two
    others: frozenset[str]
    going: frozenset[str]  # draining; a head that was told to go

    @property
    def all_go(self) -> bool:
        """The cluster is taken away, and nothing can be started anywhere."""
        return bool(self.heads) and self.going >= self.heads | self.others


@dataclass(frozen=True, slots=True)
class Replica:
    """One of Serve's that has a place."""

    deployment: str
    node_id: str
    actor: str  # its name


def _is_needed(_: JoinedCluster, node_id: str | None, told_until: float) -> bool:
    """Tells the cluster that the node goes, each time. Raises Unavailable where Serve's controller does not answer."""
    import ray

    node_id = node_id or str(ray.get_runtime_context().get_node_id())
    nodes = living_nodes()
    all_told = time.monotonic() > told_until
    if node_id in nodes.heads:
        _tell_that_the_head_goes(node_id)
        return not all_told or bool(nodes.going & nodes.others)
    _tell_ray(node_id)
    found = replicas()
    if not any(one.node_id == node_id for one in found):
        return False
    return not (all_told and nodes.all_go) or is_streamed_through(node_id, nodes, found)


def is_streamed_through(node_id: str, nodes: Nodes, found: Iterable[Replica]) -> bool:
    """Whether a cluster that is taken away needs the node for its streams. All of them come through gateways."""
    gateways = [one for one in found if one.deployment == GATEWAY and one.node_id in nodes.others]
    if any(one.node_id == node_id for one in gateways):
        end_watches()
        return have_requests(gateways)
    return bool(gateways)


def living_nodes() -> Nodes:
    """As Ray's GCS knows them."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    living = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    heads = frozenset(node_id for node_id, resources in living.items() if "node:__internal_head__" in resources)
    going = set(ray._private.state.state.get_draining_nodes())
    if head := _internal_kv_get(_HEAD_THAT_GOES, namespace=_NAMESPACE):
        going.add(head.decode())
    return Nodes(heads, frozenset(living) - heads, frozenset(going))


def _tell_that_the_head_goes(node_id: str) -> None:
    """Ray is not told: it would end a head that has nothing to do."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_HEAD_THAT_GOES, node_id.encode(), namespace=_NAMESPACE)


def _tell_ray(node_id: str) -> None:
    """Ray places nothing here any more. No deadline: before one, Serve ends replicas that nothing has replaced."""
    import ray
    from ray.core.generated import autoscaler_pb2

    gcs: Any = ray._private.worker.global_worker.gcs_client  # what `ray drain-node` asks
    gcs.drain_node(node_id, autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, "the pod is being stopped", 0)


def replicas() -> list[Replica]:
    """Serve's, but for those that have no place yet. Raises Unavailable."""
    return [
        Replica(name, replica["node_id"], replica["actor_name"])
        for application in details()["applications"].values()
        for name, deployment in application["deployments"].items()
        for replica in deployment["replicas"]
        if replica.get("node_id")
    ]


def end_watches() -> None:
    """At every gateway. One that is silent is told again at the next look."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    with suppress(TimeoutError, KeyError, RayError, RayServeException):  # KeyError: all of them have gone meanwhile
        gateways: Any = serve.get_deployment_handle(GATEWAY, GATEWAY)  # the same at each look
        if not gateways.is_initialized:
            gateways._init(_run_router_in_separate_loop=True)  # pods have it run in ours, and there is none here
        gateways.broadcast("end_watches").results(timeout_s=REQUESTS_TIMEOUT_S, return_exceptions=True)


def have_requests(gateways: Iterable[Replica]) -> bool:
    """Whether one of them has any, or does not say so."""
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    asked = []
    for gateway in gateways:
        with suppress(ValueError):  # it has gone meanwhile
            actor: Any = ray.get_actor(gateway.actor, SERVE_NAMESPACE)
            asked.append(actor.get_num_ongoing_requests.remote())
    if not asked:
        return False
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=REQUESTS_TIMEOUT_S)
    for one in answered:
        with suppress(ray.exceptions.RayActorError):
            if ray.get(one):
                return True
    return bool(silent)


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
