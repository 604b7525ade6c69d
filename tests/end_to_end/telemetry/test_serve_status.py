"""What Serve is asked while a server starts, by `manta serve` and by gateways: the right answer, for little."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.commands.serve_controller import statuses
from cluster.messages import ModelCard
from gateway.coordinators.health import ModelHealth, probe_serve
from tests.gateway.doubles import model_card


@pytest.fixture
def card(ray_cluster: str) -> ModelCard:
    """Of the demo's Mixtral, which runs."""
    [application] = [name for name in statuses() if name.startswith("mistral-small-")]
    return model_card(Path(), application=application, deployments=("coordinator", "expert-0", "expert-1"))


def test_a_model_that_does_not_run_as_a_whole_is_looked_at_replica_by_replica(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve.context import _get_global_client

    larger = replace(card, deployments=(*card.deployments, "expert-9"))
    absent = replace(card, application="nobody", deployments=("coordinator",))
    monkeypatch.setattr(_get_global_client(), "list_serve_statuses", list)  # as if none ran
    assert probe_serve([card]) == {card.application: ModelHealth("ready")}
    assert probe_serve([larger]) == {card.application: ModelHealth("starting", ("expert-9",))}
    assert probe_serve([absent]) == {"nobody": ModelHealth("starting", ("coordinator",))}


def test_asking_how_far_a_start_is_costs_a_fraction_of_serves_own_status(card: ModelCard) -> None:
    """It pickles the request router of every deployment, and cost a start on two cores a second or more."""
    from ray import serve

    absent = replace(card, application="nobody")
    of_serve = cpu_s(serve.status)
    assert cpu_s(lambda: probe_serve([absent])) < of_serve / 3
    assert cpu_s(statuses) < of_serve / 3


def cpu_s(call: Callable[[], object]) -> float:
    """What the cheapest of five calls takes of this thread."""
    taken = []
    for _ in range(5):
        started = time.thread_time()
        call()
        taken.append(time.thread_time() - started)
    return min(taken)
