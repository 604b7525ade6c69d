"""Takes a ClusterSnapshot of a running Ray cluster: nodes, Serve's status, and what its processes say of themselves.

Serve's controller is asked who there is, then all of them at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from cluster.commands.at_once import SPARE_S, at_once
from cluster.commands.cluster_connection import JoinedCluster, look_at_cluster
from cluster.commands.serve_controller import details
from cluster.commands.status.cluster_snapshot import (
    COORDINATOR,
    GATEWAY,
    ApplicationStatus,
    ClusterSnapshot,
    DeploymentStatus,
    NodeStatus,
    ProxyStatus,
)
from cluster.commands.status.node_disks import ask_disks, disks
from cluster.commands.status.proxy import proxy_answers
from cluster.commands.status.replicas import ask_replicas
from cluster.commands.status.served import application_told, computing, word
from cluster.errors import MantaError, Unavailable
from cluster.messages import EngineStats
from cluster.telemetry.kernels import ModelKernels, ProcessKernels

STEP_S = 10.0  # for Ray's GCS, for joining, and for looking, each
ANSWERS_TIMEOUT_S = 4.0  # for all processes, which are asked at once; after the controller, which says who they are

_NO_STATS = f"no coordinator answered within {ANSWERS_TIMEOUT_S:g} s"

Answers = Mapping[tuple[str, ...], Any]  # by application, and deployment or question


def inspect_cluster(address: str, *, with_kernels: bool = False) -> ClusterSnapshot:
    """Look at the cluster at `address`. Raises what look_at_cluster raises."""
    return look_at_cluster(address, partial(_inspect, with_kernels=with_kernels), STEP_S)


def _inspect(cluster: JoinedCluster, *, with_kernels: bool) -> ClusterSnapshot:
    """Whatever stands still is waited for beside all others, and costs the command seconds."""
    import ray

    asked = ask_disks()
    served: Mapping[str, Any] = {"applications": {}, "proxies": {}}
    controller_answers = False
    with suppress(Unavailable):
        served, controller_answers = details(), True
    applications = [application_told(name, one) for name, one in sorted(served["applications"].items())]
    calls: dict[tuple[str, ...], Callable[[], Any]] = {
        (one.name, question): ask for one in applications for question, ask in _questions(one)
    }
    calls |= {
        (one.name, "kernels", name): partial(ask_replicas, one.name, name, "kernels", ANSWERS_TIMEOUT_S)
        for one in applications
        for name in computing(one)
        if with_kernels or name != COORDINATOR  # a shard that says its kernels lives
    }
    calls["disks",] = partial(disks, asked, ANSWERS_TIMEOUT_S)
    here = ray.get_runtime_context().get_node_id()
    if here in served["proxies"]:
        calls["proxy",] = partial(proxy_answers, served)
    answers = at_once(calls, ANSWERS_TIMEOUT_S + SPARE_S)
    full = answers.get(("disks",))
    told = full if isinstance(full, dict) else {}
    return ClusterSnapshot(
        cluster.address,
        tuple(_node(node, told.get(node["NodeID"])) for node in ray.nodes()),
        tuple(_answered(one, answers, with_kernels=with_kernels) for one in applications),
        str(cluster.logs),
        tuple(
            ProxyStatus(
                str(one["node_ip"]), word(one["status"]), answers.get(("proxy",)) is True if node == here else None
            )
            for node, one in served["proxies"].items()
        ),
        controller_answers=controller_answers,
    )


def _questions(application: ApplicationStatus) -> Iterator[tuple[str, Callable[[], Any]]]:
    if application.name == GATEWAY:
        yield "silent", partial(_silent, application)
    elif application.model is not None:
        yield "stats", partial(_coordinator_stats, application)


def _answered(application: ApplicationStatus, answers: Answers, *, with_kernels: bool) -> ApplicationStatus:
    """With what its processes said of themselves. Those that did not come back in time count as silent."""
    if application.name == GATEWAY:
        silent = answers.get((application.name, "silent"))
        running = sum(one.running for one in application.deployments)
        return dataclasses.replace(application, silent=silent if isinstance(silent, int) else running)
    if application.model is None:
        return application
    stats = answers.get((application.name, "stats"))
    coordinators, error = (
        stats if isinstance(stats, tuple) else ((), _NO_STATS if stats is None else _first_line(stats))
    )
    kernels = None
    if with_kernels:
        told = {name: answers.get((application.name, "kernels", name)) for name in computing(application)}
        kernels = ModelKernels(
            {
                name: tuple(one for one in (of if isinstance(of, list) else ()) if isinstance(one, ProcessKernels))
                for name, of in told.items()
            }
        )
    deployments = tuple(
        _heard(one, answers.get((application.name, "kernels", one.name))) if one.group is not None else one
        for one in application.deployments
    )
    return dataclasses.replace(
        application, deployments=deployments, coordinators=coordinators, stats_error=error, kernels=kernels
    )


def _heard(deployment: DeploymentStatus, answers: object) -> DeploymentStatus:
    """With how many of its running shards stand still, and how many are being restarted."""
    if not deployment.running:
        return deployment
    if not isinstance(answers, list) or not answers:
        return dataclasses.replace(deployment, silent=deployment.running)
    failed = _failed(answers)
    restarting = sum(bool(getattr(getattr(one, "cause", one), "is_restarting", False)) for one in failed)
    return dataclasses.replace(deployment, silent=len(failed) - restarting, restarting=restarting)


def _node(node: dict[str, Any], disk: float | None) -> NodeStatus:
    resources = node.get("Resources", {})
    return NodeStatus(
        address=str(node["NodeManagerAddress"]),
        alive=bool(node["Alive"]),
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        disk=disk,
    )


def _silent(application: ApplicationStatus) -> int:
    """How many running replicas of its only deployment do not answer in time."""
    running = sum(one.running for one in application.deployments)
    if not running:
        return 0
    answers = ask_replicas(application.name, GATEWAY, "metrics", ANSWERS_TIMEOUT_S)
    return len(_failed(answers)) if answers else running


def _failed(answers: Sequence[object]) -> list[Exception]:
    """What came in place of answers. A replica that has died is not silent."""
    from ray.exceptions import ActorDiedError

    return [one for one in answers if isinstance(one, Exception) and not isinstance(one, ActorDiedError)]


def _coordinator_stats(application: ApplicationStatus) -> tuple[tuple[EngineStats, ...], str | None]:
    """The stats of each coordinator that answers in time, and what went wrong with the others."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not any(d.name == COORDINATOR and d.running for d in application.deployments):
        return (), "no coordinator is running"
    try:
        handle = serve.get_deployment_handle(COORDINATOR, app_name=application.name)
        answers = handle.broadcast("stats").results(timeout_s=ANSWERS_TIMEOUT_S, return_exceptions=True)
    except TimeoutError:
        return (), _NO_STATS
    except (ray.exceptions.RayError, RayServeException) as error:
        return (), _first_line(error)
    stats = tuple(answer for answer in answers if isinstance(answer, EngineStats))
    missing = [_first_line(answer) for answer in answers if not isinstance(answer, EngineStats)]
    return stats, f"{len(missing)} of {len(answers)} coordinators did not answer: {missing[0]}" if missing else None


def _first_line(error: object) -> str:
    """What it says, without its trace."""
    from ray.exceptions import GetTimeoutError

    if isinstance(error, MantaError):
        return error.message
    if isinstance(error, GetTimeoutError):
        return f"no answer within {ANSWERS_TIMEOUT_S:g} s"
    lines = str(error).splitlines()
    return (lines[-1].strip() if lines else "") or type(error).__name__
