"""What a coordinator does on its event loop with what the engine's thread hands over."""

import asyncio
import threading
import time

import pytest

from cluster.errors import CoordinatorLost, StepFailed
from cluster.messages import TokenChunk
from router_service.coordinator import Coordinator
from tests.router_service.requests import make_request


class Waiting:
    """Who waits for one request; the first item may be one that it cannot take."""

    def __init__(self, broken=False):
        self.broken = broken
        self.items = []

    def put(self, item):
        if self.broken and isinstance(item, TokenChunk):
            raise RuntimeError("injected")
        self.items.append(item)


@pytest.fixture
def coordinator():
    """Without Serve, engine and model."""
    made = object.__new__(Coordinator)
    made._waiting = {}
    return made


def test_an_item_that_cannot_be_handed_out_costs_nobody_elses(coordinator):
    """What came after it in the same step was lost, and its requests waited for ever."""
    names = ("first", "broken", "last")
    coordinator._waiting = {(name, 0): Waiting(name == "broken") for name in names}
    chunks = [((name, 0), TokenChunk(name, 0, 0, (7,))) for name in (*names, "gone")]
    coordinator._hand_out(chunks)
    first, broken, last = coordinator._waiting.values()
    assert [first.items, last.items] == [[chunks[0][1]], [chunks[2][1]]]
    assert [type(item) for item in broken.items] == [StepFailed]


def test_a_call_that_comes_twice_is_asked_again_under_another_id(coordinator):
    request = make_request([5])
    coordinator._check_unique(request)
    coordinator._waiting[request.key] = Waiting()
    with pytest.raises(CoordinatorLost):
        coordinator._check_unique(request)


def test_a_designed_error_is_an_answer(coordinator):
    """Serve logs what is raised as its own failure, with a traceback and what the client wrote."""
    request = make_request([5])
    coordinator._waiting[request.key] = Waiting()
    refused = asyncio.run(coordinator.generate(request, "gateway")), asyncio.run(coordinator.embed((request,)))
    assert [type(error) for error in refused] == [CoordinatorLost] * 2


def test_a_dead_engine_ends_its_process_after_its_last_words(coordinator, monkeypatch):
    ended = []
    over = threading.Event()
    monkeypatch.setattr("router_service.coordinator.LAST_WORDS_S", 0.05)
    monkeypatch.setattr("os._exit", lambda status: (ended.append((status, time.monotonic())), over.set()))
    began = time.monotonic()
    coordinator._end_process()
    assert over.wait(60)
    [(status, at)] = ended
    assert status == 1
    assert at - began >= 0.05, "whoever waits is told first"
