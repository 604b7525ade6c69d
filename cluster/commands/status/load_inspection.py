"""Asks every process of every model for its figures, those that /metrics shows. Knows Serve's handles; no drawing."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from cluster.commands.at_once import SPARE_S, at_once
from cluster.commands.cluster_connection import JoinedCluster
from cluster.commands.serve_controller import details
from cluster.commands.status.model_load import LoadSample
from cluster.commands.status.replicas import ask_replicas
from cluster.commands.status.served import application_told, computing
from cluster.telemetry.metrics import ProcessFigures

TIMEOUT_S = 3.0  # for the replicas of one deployment


def inspect_load(cluster: JoinedCluster) -> list[LoadSample]:  # noqa: ARG001  # every look is given it
    """One sample per model that has a coordinator, in the order of their names; what is silent is missing in it.

    Raises Unavailable where Serve's controller is.
    """
    models: dict[str, str] = {}
    calls: dict[tuple[str, str], Callable[[], list[ProcessFigures]]] = {}
    for name, one in sorted(details()["applications"].items()):
        application = application_told(name, one)
        if application.model is None:
            continue
        models[name] = application.model[0]
        calls |= {(name, deployment): partial(_figures, name, deployment) for deployment in computing(application)}
    answers = at_once(calls, TIMEOUT_S + SPARE_S)
    told = {key: answer for key, answer in answers.items() if not isinstance(answer, Exception)}
    return [
        LoadSample.of(
            model,
            time.monotonic(),
            [one.families for (application, _), figures in told.items() if application == name for one in figures],
        )
        for name, model in models.items()
    ]


def _figures(application: str, deployment: str) -> list[ProcessFigures]:
    answers = ask_replicas(application, deployment, "metrics", TIMEOUT_S)
    return [answer for answer in answers if isinstance(answer, ProcessFigures)]
