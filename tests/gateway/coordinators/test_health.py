"""What a model's state is called, from what Serve says of its deployments (words and triggers of Ray 2.60)."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.messages import ModelCard
from cluster.telemetry.progress import Progress
from gateway.coordinators import health
from gateway.coordinators.health import RECOVERY_S, Health, ModelHealth, health_of

DEPLOYMENTS = ("coordinator", "expert-0")


def deployment(status: str, trigger: str, *states: str) -> dict[str, Any]:
    return {"status": status, "status_trigger": trigger, "replicas": [{"state": state} for state in states]}


UP = deployment("HEALTHY", "CONFIG_UPDATE_COMPLETED", "RUNNING")
DIED = deployment("UNHEALTHY", "HEALTH_CHECK_FAILED", "STARTING")


def told(card: ModelCard, status: str, coordinator: dict[str, Any], *progress: Progress) -> ModelHealth:
    application = {"status": status, "deployments": {"coordinator": coordinator, "expert-0": UP}}
    return health_of(replace(card, deployments=DEPLOYMENTS), application, progress)


def test_a_coordinator_that_serve_replaces_is_recovering(card: ModelCard) -> None:
    """It was called failed from the death until the new one ran, though nothing was to do but wait."""
    assert told(card, "UNHEALTHY", DIED) == ModelHealth("recovering", ("coordinator",))
    while_changed = deployment("DEPLOY_FAILED", "HEALTH_CHECK_FAILED", "STARTING")
    assert told(card, "DEPLOY_FAILED", while_changed) == ModelHealth("recovering", ("coordinator",))


def test_it_says_how_far_the_new_one_is_with_its_weights(card: ModelCard) -> None:
    """What was read before the death, and what others have read, is no progress."""
    others = (Progress("expert-0", 30_000_000, 30_000_000), Progress("expert-1", 1, 2))
    state = told(card, "UNHEALTHY", DIED, Progress("coordinator", 10_000_000, 20_000_000), *others)
    assert state == ModelHealth("recovering", ("coordinator",), 10_000_000, 20_000_000)
    assert str(state) == "waiting for coordinator, loading weights, 10 of 20 MB"
    assert str(told(card, "UNHEALTHY", DIED, Progress("coordinator", 20, 20))) == "waiting for coordinator"


@pytest.mark.parametrize("status", ["UNHEALTHY", "DEPLOY_FAILED"])
def test_replicas_that_do_not_start_three_times_in_a_row_have_failed(card: ModelCard, status: str) -> None:
    state = told(card, status, deployment(status, "REPLICA_STARTUP_FAILED", "STARTING"))
    assert state == ModelHealth("failed", ("coordinator",))
    assert str(state) == "failed, there is no coordinator"


def test_an_application_that_cannot_be_built_has_failed(card: ModelCard) -> None:
    application = {"status": "DEPLOY_FAILED", "deployments": {}}
    assert health_of(replace(card, deployments=DEPLOYMENTS), application, ()) == ModelHealth("failed", DEPLOYMENTS)


def test_what_starts_for_the_first_time_has_lost_nothing(card: ModelCard) -> None:
    starts = deployment("UPDATING", "CONFIG_UPDATE_STARTED", "STARTING")
    assert told(card, "DEPLOYING", starts) == ModelHealth("starting", ("coordinator",))
    loads = told(card, "DEPLOYING", starts, Progress("coordinator", 1, 2), Progress("expert-0", 2, 2))
    assert loads == ModelHealth("loading", ("coordinator",), 3, 4)
    assert health_of(replace(card, deployments=DEPLOYMENTS), None, ()) == ModelHealth("starting", DEPLOYMENTS)


def test_a_deployment_that_lost_one_of_two_replicas_is_ready(card: ModelCard) -> None:
    assert (
        told(card, "UNHEALTHY", deployment("UNHEALTHY", "HEALTH_CHECK_FAILED", "RUNNING", "STARTING")).phase == "ready"
    )


def test_what_does_not_recover_in_a_quarter_of_an_hour_has_failed(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that waits for a node that never comes is no failed start to Serve."""
    now = 1000.0
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now))
    lost = ModelHealth("recovering", ("coordinator",))
    states = [lost, lost, ModelHealth("ready"), lost, lost]
    pauses_s = [1, RECOVERY_S + 1, 1, RECOVERY_S + 1, 1]

    async def run() -> list[str]:
        nonlocal now
        looks = iter(states)
        checked = Health((card,), lambda cards: {card.application: next(looks)})
        phases = []
        for pause_s in pauses_s:
            now += pause_s
            phases.append((await checked.models())[card.name].phase)
        return phases

    assert asyncio.run(run()) == ["recovering", "failed", "ready", "recovering", "recovering"]


def test_a_controller_that_stands_still_takes_one_thread_of_a_gateway(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each look at it took another, for as long as it stood still; when all were taken, long gRPC messages waited.

    And each look took five seconds, more than a load balancer waits for `/health` of a gateway that answers clients.
    """
    monkeypatch.setattr(health, "MAX_AGE_S", 0.0)
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 2.0)
    monkeypatch.setattr(health, "HUNG_PROBE_TIMEOUT_S", 0.05)
    goes_on = threading.Event()
    asked = []

    def probe(cards: object) -> dict[str, ModelHealth]:
        asked.append(cards)
        goes_on.wait(60)
        return {card.application: ModelHealth("ready")}

    async def run() -> tuple[list[str], int, float]:
        began_s = time.monotonic()
        checked = Health((card,), probe)
        phases = [(await checked.models())[card.name].phase for _ in range(20)]
        num_asked, took_s = len(asked), time.monotonic() - began_s
        goes_on.set()
        monkeypatch.setattr(health, "HUNG_PROBE_TIMEOUT_S", 60.0)
        return [*phases, (await checked.models())[card.name].phase], num_asked, took_s

    phases, num_asked, took_s = asyncio.run(run())
    assert (phases, num_asked) == (["starting"] * 20 + ["ready"], 1)
    assert took_s < 20, "each look waits for as long as the first one"
    assert [record.message for record in caplog.records] == ["Serve's status could not be had"]
