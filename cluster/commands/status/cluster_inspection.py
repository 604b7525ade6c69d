"""Takes a ClusterSnapshot of a running Ray cluster: nodes, Serve's status, and what its processes say of themselves."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from cluster.commands.cluster_connection import JoinedCluster, look_at_cluster
from cluster.commands.status.cluster_snapshot import (
    COORDINATOR,
    GATEWAY,
    ROOT,
    ApplicationStatus,
    ClusterSnapshot,
    DeploymentStatus,
    NodeStatus,
)
from cluster.commands.status.node_disks import ask_disks, disks
from cluster.commands.status.replicas import ask_replicas
from cluster.errors import MantaError
from cluster.messages import EngineStats
from cluster.telemetry.kernels import ModelKernels, ProcessKernels

STATS_TIMEOUT_S = 5.0  # for the coordinators of one application
GATEWAYS_TIMEOUT_S = 5.0
DISKS_TIMEOUT_S = 5.0  # beside the time that all others took
KERNELS_TIMEOUT_S = 3.0  # for the replicas of one deployment


def inspect_cluster(address: str, *, with_kernels: bool = False) -> ClusterSnapshot:
    """Look at the cluster at `address`. Raises what look_at_cluster raises."""
    return look_at_cluster(address, partial(_inspect, with_kernels=with_kernels))


def _inspect(cluster: JoinedCluster, *, with_kernels: bool) -> ClusterSnapshot:
    import ray
    from ray import serve

    asked = ask_disks()
    overviews = serve.status().applications
    applications = [_application(name, overviews[name]) for name in sorted(overviews)]
    if with_kernels:
        applications = [
            dataclasses.replace(one, kernels=_kernels(one)) if one.model is not None else one for one in applications
        ]
    told = disks(asked, DISKS_TIMEOUT_S)
    nodes = tuple(_node(node, told.get(node["NodeID"])) for node in ray.nodes())
    return ClusterSnapshot(cluster.address, nodes, tuple(applications), str(cluster.logs))


def _kernels(application: ApplicationStatus) -> ModelKernels:
    """Those of all processes that say them in time."""
    names = [d.name for d in application.deployments if d.running and (d.name == COORDINATOR or d.group is not None)]
    asked = sorted(names, key=lambda name: (name != COORDINATOR, name))
    told = {name: ask_replicas(application.name, name, "kernels", KERNELS_TIMEOUT_S) for name in asked}
    return ModelKernels(
        {name: tuple(one for one in answers if isinstance(one, ProcessKernels)) for name, answers in told.items()}
    )


def _node(node: dict[str, Any], disk: float | None) -> NodeStatus:
    resources = node.get("Resources", {})
    return NodeStatus(
        address=str(node["NodeManagerAddress"]),
        alive=bool(node["Alive"]),
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        disk=disk,
    )


def _application(name: str, overview: Any) -> ApplicationStatus:
    deployments = tuple(
        DeploymentStatus(
            name=key,
            status=str(deployment.status.value),
            replicas={str(state): count for state, count in deployment.replica_states.items() if count},
            message=deployment.message,
        )
        for key, deployment in sorted(overview.deployments.items())
        if key != ROOT  # which never runs
    )
    application = ApplicationStatus(name, str(overview.status.value), deployments, overview.message)
    if name == GATEWAY:
        return dataclasses.replace(application, silent=_silent(application))
    if application.model is None:
        return application
    coordinators, error = _coordinator_stats(application)
    return dataclasses.replace(application, coordinators=coordinators, stats_error=error)


def _silent(application: ApplicationStatus) -> int:
    """How many running replicas of its only deployment do not answer in time. One that has died is not silent."""
    from ray.exceptions import ActorDiedError

    running = sum(one.running for one in application.deployments)
    if not running:
        return 0
    answers = ask_replicas(application.name, GATEWAY, "metrics", GATEWAYS_TIMEOUT_S)
    silent = [one for one in answers if isinstance(one, Exception) and not isinstance(one, ActorDiedError)]
    return len(silent) if answers else running


def _coordinator_stats(application: ApplicationStatus) -> tuple[tuple[EngineStats, ...], str | None]:
    """The stats of each coordinator that answers in time, and what went wrong with the others."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not any(d.name == COORDINATOR and d.running for d in application.deployments):
        return (), "no coordinator is running"
    try:
        handle = serve.get_deployment_handle(COORDINATOR, app_name=application.name)
        answers = handle.broadcast("stats").results(timeout_s=STATS_TIMEOUT_S, return_exceptions=True)
    except TimeoutError:
        return (), f"no coordinator answered within {STATS_TIMEOUT_S:g} s"
    except (ray.exceptions.RayError, RayServeException) as error:
        return (), _first_line(error)
    stats = tuple(answer for answer in answers if isinstance(answer, EngineStats))
    missing = [_first_line(answer) for answer in answers if not isinstance(answer, EngineStats)]
    return stats, f"{len(missing)} of {len(answers)} coordinators did not answer: {missing[0]}" if missing else None


def _first_line(error: object) -> str:
    if isinstance(error, MantaError):
        return error.message
    lines = str(error).splitlines()
    return (lines[-1].strip() if lines else "") or type(error).__name__
