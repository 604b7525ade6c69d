"""What the object store's carrier keeps of calls that nobody waits for. Ray is played, so that calls end when told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experts_service.carriers import object_store
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.transport import GroupRows

DEPLOYMENT = Deployment("model", "expert-0")


class PlayedRay:
    """One actor that answers when it is told to."""

    def __init__(self) -> None:
        self.ended: set[object] = set()
        self.posted: list[object] = []
        self.run_inline = SimpleNamespace(remote=self._call)

    def _call(self, packed: bytes) -> object:
        assert packed
        self.posted.append(object())
        return self.posted[-1]

    def get_actor(self, name: str, namespace: str) -> PlayedRay:
        assert (name, namespace) == ("shard", "test")
        return self

    def wait(self, references: list[object], **_: Any) -> tuple[list[object], list[object]]:
        ended = [one for one in references if one in self.ended]
        return ended, [one for one in references if one not in self.ended]

    def get(self, references: list[object], timeout: float) -> list[np.ndarray[Any, Any]]:
        assert timeout > 0
        assert self.ended.issuperset(references)
        return [np.ones((1, 2), np.float32) for _ in references]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_answers_that_nobody_waits_for_are_let_go_once_they_have_come(
    num_replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only replica of a group is never weighed against another: its calls were kept, and their answers by Ray."""
    ray = PlayedRay()
    monkeypatch.setattr(object_store, "ray", ray)
    table = RoutingTable()
    table.publish(DEPLOYMENT, [Replica(f"r{i}", "shard", "test", 0, "f") for i in range(num_replicas)])
    transport = ObjectStoreTransport({0: DEPLOYMENT}, table, fingerprint="f", timeout_s=30.0)
    routes = transport._routes

    def send() -> Any:
        answers = torch.zeros(1, 2)
        return transport.send(0, torch.ones(1, 2), [GroupRows(0, np.array([0]), (1,), answers, 0)])

    for _ in range(20):
        send().close()  # the step failed elsewhere
    assert sum(routes.owed(f"r{i}") for i in range(num_replicas)) == 20, "a replica that is stopped owes them all"
    ray.ended.update(ray.posted)
    flight = send()
    ray.ended.update(ray.posted)
    flight.wait()
    assert not routes.calls
    assert not routes.unwanted
