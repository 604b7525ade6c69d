"""Hosts whose clocks are an hour apart: gateway and coordinator agree on how long a request may take."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from tests.conftest import running_server

pytestmark = pytest.mark.long

CONFIG = """
models: [{name: mistral-small, path: demo}, {name: mistral-embed, path: demo-dense, kind: embedding}]
gateway: {request_timeout_s: 120}
"""
# Every process imports it first. Those that have an engine, the coordinators, live an hour later, or earlier.
SITE = """
import sys, time

now = time.time
time.time = lambda: now() + ({ahead_s} if "router_service.engine" in sys.modules else 0)
"""


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_coordinators_whose_clock_is_an_hour_off_answer(
    ahead_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose clock was ahead by more than `request_timeout_s` failed every request before its first step."""
    (tmp_path / "sitecustomize.py").write_text(SITE.format(ahead_s=ahead_s))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    question = [{"role": "user", "content": "What is the best French cheese?"}]
    with running_server(CONFIG) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        chat = client.post("/v1/chat/completions", json={"model": "mistral-small", "messages": question})
        assert chat.status_code == 200, chat.text
        embedding = client.post("/v1/embeddings", json={"model": "mistral-embed", "input": "cheese"})
        assert embedding.status_code == 200, embedding.text
