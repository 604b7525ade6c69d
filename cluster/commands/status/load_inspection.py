"""Asks every process of every model for its figures, those that /metrics shows. Knows Serve's handles; no drawing."""

from __future__ import annotations

import time

from cluster.commands.cluster_connection import JoinedCluster
from cluster.commands.status.cluster_snapshot import COORDINATOR, ApplicationStatus, DeploymentStatus
from cluster.commands.status.model_load import LoadSample
from cluster.commands.status.replicas import ask_replicas
from cluster.telemetry.metrics import ProcessFigures

TIMEOUT_S = 3.0  # for the replicas of one deployment


def inspect_load(cluster: JoinedCluster) -> list[LoadSample]:  # noqa: ARG001  # every look is given it
    """One sample per model that has a coordinator, in the order of their names; what is silent is missing in it."""
    from ray import serve

    samples = []
    for name, overview in sorted(serve.status().applications.items()):
        deployments = tuple(
            DeploymentStatus(key, str(one.status.value), dict(one.replica_states))
            for key, one in overview.deployments.items()
        )
        model = ApplicationStatus(name, str(overview.status.value), deployments).model
        if model is None:
            continue
        asked = [d.name for d in deployments if d.running and (d.name == COORDINATOR or d.group is not None)]
        processes = [figures.families for deployment in asked for figures in _figures(name, deployment)]
        samples.append(LoadSample.of(model[0], time.monotonic(), processes))
    return samples


def _figures(application: str, deployment: str) -> list[ProcessFigures]:
    answers = ask_replicas(application, deployment, "metrics", TIMEOUT_S)
    return [answer for answer in answers if isinstance(answer, ProcessFigures)]
