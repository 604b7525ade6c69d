"""Lanes with memory that both ends map, and without: what fails, fails in both."""

from __future__ import annotations

import pytest

from tests.experts_service import lanes


def _carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setattr(lanes, "MEMORY", name == "memory")
    return name


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinators ask shards on their node for some to share."""
    monkeypatch.setattr(lanes, "MEMORY", True)


@pytest.fixture(params=["sent", "memory"])
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows travel over the lanes of a test. Over TCP they are sent, whatever a coordinator asks for."""
    return _carrier(request, monkeypatch)


@pytest.fixture(params=[pytest.param("sent", marks=pytest.mark.long), "memory"])
def usual_carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same for tests that take seconds, of what does not hang on it."""
    return _carrier(request, monkeypatch)


@pytest.fixture
def unhedged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks a second replica before the first has failed, or was silent for too long."""
    monkeypatch.setattr("experts_service.delivery.replica_load.BURST", 0.0)
    monkeypatch.setattr("experts_service.delivery.delivery.OVERDUE_S", float("inf"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica is silent for too long after one second, while a dispatch may take its time."""
    monkeypatch.setattr("experts_service.delivery.delivery.SILENCES_PER_TIMEOUT", lanes.LONG_S)
