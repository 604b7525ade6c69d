"""What the object store's carrier keeps of calls, and of whom it waits for. Ray is played: calls end when told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ExpertUnavailable
from experts_service.carriers import object_store
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.routing_table import RoutingTable
from experts_service.shard_handles import ShardHandles
from experts_service.transport import GroupRows
from tests.experts_service.played_gcs import PlayedGcs, played_gcs
from tests.experts_service.replicas import DEPLOYMENT, replica, table
from tests.waiting import wait_for


class PlayedRay:
    """Calls that are answered when they are told to be, or at once."""

    def __init__(self) -> None:
        self.ended: set[object] = set()
        self.posted: list[object] = []
        self.answers_at_once = False

    def call(self, packed: bytes) -> object:
        assert packed
        self.posted.append(object())
        if self.answers_at_once:
            self.ended.add(self.posted[-1])
        return self.posted[-1]

    def wait(self, references: list[object], **_: Any) -> tuple[list[object], list[object]]:
        ended = [one for one in references if one in self.ended]
        return ended, [one for one in references if one not in self.ended]

    def get(self, references: list[object], timeout: float) -> list[np.ndarray[Any, Any]]:
        assert timeout >= 0
        assert self.ended.issuperset(references)
        return [np.ones((1, 2), np.float32) for _ in references]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    played = PlayedRay()
    monkeypatch.setattr(object_store, "ray", played)
    return played


@pytest.fixture
def gcs(ray: PlayedRay, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGcs]:
    with played_gcs(monkeypatch, run_inline=ray.call) as played:
        yield played


def transport_to(routes: RoutingTable, timeout_s: float = 30.0) -> ObjectStoreTransport:
    handles = ShardHandles(routes, [DEPLOYMENT])
    return ObjectStoreTransport({0: DEPLOYMENT}, routes, handles, fingerprint="f", timeout_s=timeout_s)


def send(transport: ObjectStoreTransport) -> Any:
    return transport.send(0, torch.ones(1, 2), [GroupRows(0, np.array([0]), (1,), torch.zeros(1, 2), 0)])


@pytest.mark.usefixtures("gcs")
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_answers_that_nobody_waits_for_are_let_go_once_they_have_come(num_replicas: int, ray: PlayedRay) -> None:
    """The only replica of a group is never weighed against another: its calls were kept, and their answers by Ray."""
    names = [f"r{i}" for i in range(num_replicas)]
    transport = transport_to(table(*names))
    routes = transport._routes
    wait_for(lambda: len(routes.reachable(0)) == num_replicas, 60, "their actors")
    for _ in range(20):
        send(transport).close()  # the step failed elsewhere
    assert sum(routes.owed(name) for name in names) == 20, "a replica that is stopped owes them all"
    ray.ended.update(ray.posted)
    flight = send(transport)
    ray.ended.update(ray.posted)
    flight.wait()
    assert not routes.calls
    assert not routes.unwanted


def test_rows_wait_for_no_gcs_while_a_replica_is_known(gcs: PlayedGcs, ray: PlayedRay) -> None:
    """A replica that was new was asked for by the engine's thread: every stream stood for Ray's minute."""
    routes = table("old")
    transport = transport_to(routes)
    wait_for(lambda: transport._routes.reachable(0), 60, "its actor")
    gcs.stop()
    routes.publish(DEPLOYMENT, [replica("old"), replica("new")])
    ray.answers_at_once = True
    began = time.monotonic()
    for _ in range(20):
        send(transport).wait()
    assert time.monotonic() - began < 10
    assert [one.suspected for one in routes.replicas(DEPLOYMENT)] == [False, False], "nothing is known against it"
    gcs.goes_on.set()
    wait_for(lambda: len(transport._routes.reachable(0)) == 2, 60, "the new one")


def test_rows_whose_only_replica_is_not_found_wait_until_it_is(gcs: PlayedGcs, ray: PlayedRay) -> None:
    """Or until their deadline: a new coordinator's first rows are sent as soon as Ray has said to whom."""
    gcs.stop()
    routes = table("only")
    ray.answers_at_once = True
    began = time.monotonic()
    with pytest.raises(ExpertUnavailable, match=r"did not answer for layer 0 within 0.3 s .*not been found yet"):
        send(transport_to(routes, timeout_s=0.3)).wait()
    assert time.monotonic() - began < 10
    flight = send(transport_to(routes))
    timer = threading.Timer(0.2, gcs.goes_on.set)
    timer.start()
    flight.wait()
    timer.join()
    assert len(ray.posted) == 1
    assert [one.suspected for one in routes.replicas(DEPLOYMENT)] == [False]
