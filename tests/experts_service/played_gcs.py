"""A GCS that is played: it answers for names of actors, says that there is none, or stands still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tests.waiting import wait_for

LONGEST_S = 60.0  # as Ray's own; a test that waits for it has failed


@contextmanager
def played_gcs(monkeypatch: pytest.MonkeyPatch, **methods: Callable[..., object]) -> Iterator[PlayedGcs]:
    """Instead of Ray's, with `methods` of its actors. Nobody asks it any more when the block has ended."""
    played = PlayedGcs(methods)
    monkeypatch.setattr(ray, "get_actor", played.get_actor)
    yield played
    played.goes_on.set()
    wait_for(no_search_runs, LONGEST_S, "the last search")


def no_search_runs() -> bool:
    return all(one.name != "shard-handles" for one in threading.enumerate())


class PlayedGcs:
    """Takes the place of `ray.get_actor`. Every name is one of an actor, but for those in `unknown`."""

    def __init__(self, methods: Mapping[str, Callable[..., object]]) -> None:
        self._methods = methods
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.unknown: set[str] = set()
        self.asked: list[str] = []
        self.called: list[str] = []  # whose `stats`

    def stop(self) -> None:
        self.goes_on.clear()

    def get_actor(self, name: str, namespace: str) -> Any:
        assert namespace == "test"
        self.asked.append(name)
        assert self.goes_on.wait(LONGEST_S)
        if name in self.unknown:
            raise ValueError(f"no actor {name} lives")
        methods = {"stats": lambda: self._call(name), **self._methods}
        return SimpleNamespace(name=name, **{one: SimpleNamespace(remote=call) for one, call in methods.items()})

    def _call(self, name: str) -> Any:
        self.called.append(name)
        return SimpleNamespace(future=Future[None])
