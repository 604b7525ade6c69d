"""A server as a container starts it: its doors are open to other machines, and it makes the key that they need."""

from __future__ import annotations

import re
import socket

import httpx
import psutil
import pytest

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import questions
from tests.conftest import running_server

CONFIG = f"models: [{{name: demo, path: {DIRECTORY}, engine: {{kv_cache_gib: 0.0625}}, experts: {{transport: local}}}}]"
CHEESE = "What is the best French cheese?"
BODY = {"model": "demo", "messages": [{"role": "user", "content": CHEESE}], "temperature": 0}


def test_the_key_that_it_shows_opens_it_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_HOST", "0.0.0.0")
    monkeypatch.setenv("MANTA_MAKE_API_KEY", "1")
    with running_server(CONFIG) as server:
        made = re.search(r"API key, made for this start and shown only here: (manta-\S+)", server.announcement)
        assert made is not None, server.announcement
        _, _, port = server.url.rpartition(":")
        for host in _addresses():
            url = f"http://{host}:{port}/v1/chat/completions"
            refused = [httpx.post(url, json=BODY, headers=headers) for headers in ({}, _bearer("manta-other"))]
            assert [answer.status_code for answer in refused] == [401, 401]
            answer = httpx.post(url, json=BODY, headers=_bearer(made[1]), timeout=120).json()
            assert answer["choices"][0]["message"]["content"] == dict(questions())[CHEESE]


def _addresses() -> list[str]:
    """Loopback, and how another machine would reach this one, if it has an address."""
    found = [one.address for card in psutil.net_if_addrs().values() for one in card if one.family == socket.AF_INET]
    return sorted({"127.0.0.1", *found})


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
