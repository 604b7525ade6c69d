"""SIGTERM to the only gateway of a server: what it has begun it ends, and another one takes what comes next.

One that is stopped answers nobody, and `manta status` tells of it.
"""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.processes import processes, status
from tests.waiting import wait_for

GATEWAY = "ServeReplica:gateway:gateway"
RECOVERY_S = 120
NUM_TOKENS = 600
ASKED = {"model": "manta-demo", "prompt": "Once upon a time", "max_tokens": NUM_TOKENS, "ignore_eos": True}


def test_sigterm_to_the_only_gateway_ends_no_stream_and_another_one_comes(server):
    """There is nobody else to take what is new: it is told when to ask again, until the new gateway answers."""
    [gateway] = processes(server, GATEWAY)
    fields = {"stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ASKED | fields, timeout=300) as answer:
        events = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        read = [next(events)]
        gateway.terminate()
        refused = [httpx.get(f"{server.url}/version", timeout=60) for _ in range(3)]
        read += events
    ended_at = time.monotonic()
    assert read[-1] == "[DONE]"
    choices = [choice for event in read[:-1] for choice in json.loads(event)["choices"]]
    assert sum(len(choice["token_ids"]) for choice in choices) == NUM_TOKENS
    assert choices[-1]["finish_reason"] == "length"
    assert all(other.status_code == 200 or int(other.headers["retry-after"]) >= 1 for other in refused)
    gateway.wait(RECOVERY_S)
    assert time.monotonic() - ended_at < RECOVERY_S, "its grace is ten minutes"
    wait_for(lambda: _is_served(server.url), RECOVERY_S, "another gateway")
    assert [one.pid for one in processes(server, GATEWAY)] != [gateway.pid]
    whole = httpx.post(f"{server.url}/v1/completions", json=ASKED, timeout=300).json()
    assert whole["usage"]["completion_tokens"] == NUM_TOKENS


@pytest.mark.long
def test_status_tells_of_the_only_gateway_that_is_stopped(server):
    """No client was answered, and it said that all was well."""
    [gateway] = processes(server, GATEWAY)
    gateway.suspend()
    try:
        began = time.monotonic()
        said = " ".join(status(server).split())
        took_s = time.monotonic() - began
    finally:
        gateway.resume()
    assert "1 of 1 gateways stand still: the requests that they have wait, and so do all new ones." in said
    assert took_s < 60, "it waits 5 s for it, and starts on a busy machine"
    wait_for(lambda: _is_served(server.url), RECOVERY_S, "the gateway")
    assert "gateways stand still" not in status(server)


def _is_served(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False
