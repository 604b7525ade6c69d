"""Whether a raylet answers: any word of it counts, silence and a closed port do not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cluster.commands import raylets

HERE = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that knows no method, as a raylet that wants a token knows no caller."""
    server = grpc.server(ThreadPoolExecutor(1))
    bound = server.add_insecure_port(f"{HERE}:0")
    server.start()
    yield bound
    server.stop(None)


def test_any_answer_counts(port: int) -> None:
    assert raylets.answers(HERE, port, 60.0)


def test_silence_and_a_closed_port_do_not() -> None:
    with socket.create_server((HERE, 0)) as mute:
        port = mute.getsockname()[1]
        assert not raylets.answers(HERE, port, 0.5)
    assert not raylets.answers(HERE, port, 60.0)


def test_only_the_living_raylets_of_this_machine_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that stood still, joining held the process for half a minute and ended it without a word."""

    def node(address: str, number: int, state: int = 0) -> Any:
        return SimpleNamespace(node_manager_address=address, node_manager_port=number, state=state)

    nodes = {1: node("10.0.0.2", 1), 2: node(HERE, 2, state=1), 3: node(HERE, 3), 4: node(HERE, 4)}
    gcs = SimpleNamespace(get_all_node_info=lambda timeout: nodes)
    asked: list[int] = []

    def answers(_host: str, number: int) -> bool:
        asked.append(number)
        return number == 4

    monkeypatch.setattr(raylets, "answers", answers)
    assert not raylets.silent(gcs, HERE)
    assert asked == [3, 4]
    del nodes[4]
    assert raylets.silent(gcs, HERE)
    del nodes[3]
    assert not raylets.silent(gcs, HERE), "where there is none, joining says so"
