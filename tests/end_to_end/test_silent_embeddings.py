"""Embeddings that were asked of a coordinator which falls silent come from another one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import Server, running_server
from tests.processes import processes

DENSE = Path(__file__).parents[2] / "cluster" / "demo_model" / "dense"
CONFIG = f"""
models:
  - name: embed
    path: {DENSE}
    kind: embedding
    num_coordinators: 2
    engine: {{max_model_len: 512, kv_cache_gib: 0.1}}
"""
SILENT_S = 60.0  # ten times what it takes; the request's own deadline is far beyond


@pytest.fixture(scope="module")
def two() -> Iterator[Server]:
    """Two coordinators of a model without experts."""
    with running_server(CONFIG) as server:
        yield server


def embed(server: Server) -> list[float]:
    answer = httpx.post(
        f"{server.url}/v1/embeddings", json={"model": "embed", "input": ["a", "b"]}, timeout=2 * SILENT_S
    )
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"][0]["embedding"])


def test_no_embedding_waits_for_a_stopped_coordinator(two):
    expected = embed(two)
    stopped, _ = processes(two, "ray::ServeReplica:embed")
    stopped.send_signal(signal.SIGSTOP)
    try:
        asked_at = time.monotonic()
        with ThreadPoolExecutor(10) as clients:
            answers = list(clients.map(lambda _: embed(two), range(10)))
        assert time.monotonic() - asked_at < SILENT_S
        assert answers == [expected] * 10
    finally:
        stopped.send_signal(signal.SIGCONT)
