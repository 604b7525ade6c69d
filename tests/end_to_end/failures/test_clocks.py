"""Hosts whose clocks are an hour apart: gateway and coordinator agree on how long a request may take."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import pytest

from tests.conftest import running_server
from tests.programs import REPOSITORY

pytestmark = pytest.mark.long

CONFIG = """
models: [{name: mistral-small, path: demo}, {name: mistral-embed, path: demo-dense, kind: embedding}]
gateway: {request_timeout_s: 120}
"""


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_coordinators_whose_clock_is_an_hour_off_answer(
    ahead_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose clock was ahead by more than `request_timeout_s` failed every request before its first step."""
    clock = REPOSITORY / "tests" / "programs" / "end_to_end" / "coordinators_clock.py"
    shutil.copyfile(clock, tmp_path / "sitecustomize.py")
    monkeypatch.setenv("MANTA_TEST_AHEAD_S", str(ahead_s))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    question = [{"role": "user", "content": "What is the best French cheese?"}]
    with running_server(CONFIG) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        chat = client.post("/v1/chat/completions", json={"model": "mistral-small", "messages": question})
        assert chat.status_code == 200, chat.text
        embedding = client.post("/v1/embeddings", json={"model": "mistral-embed", "input": "cheese"})
        assert embedding.status_code == 200, embedding.text
