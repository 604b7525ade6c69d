"""What a client sends is bounded before it is understood: its size, its time, its depth, and all of it together."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.messages import ModelCard
from gateway.admission.api_keys import digest, new_key
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, tokens_script
from tests.waiting import wait_for

PATH = "/v1/completions"
BODY = b'{"model": "tiny", "prompt": "Hello"}'


@pytest.fixture
def timeout_s() -> float:
    return 300.0


@pytest.fixture
def url(card: ModelCard, timeout_s: float) -> Iterator[str]:
    config = GatewayConfig(max_body_bytes=20_000, max_bytes_received=50_000, body_timeout_s=timeout_s)
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([40])), config)) as url:
        yield url


def begin(url: str, body: bytes, declared: int | None = None, **headers: str) -> http.client.HTTPConnection:
    """A request whose body is not complete: `declared` bytes, or chunks without an end."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", PATH)
    for name, value in {"content-type": "application/json", **headers}.items():
        connection.putheader(name, value)
    if declared is None:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(b"%x\r\n%s\r\n" % (len(body), body))
    else:
        connection.putheader("Content-Length", str(declared))
        connection.endheaders()
        connection.send(body)
    return connection


def answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content["error"]


@pytest.mark.parametrize("timeout_s", [0.5])
@pytest.mark.parametrize("declared", [1000, None])
def test_a_body_that_never_ends_is_408(url: str, declared: int | None) -> None:
    started = time.monotonic()
    connection = begin(url, b'{"model":', declared)
    status, error = answer(connection)
    assert (status, error["code"]) == (408, "request_timeout")
    assert 0.4 < time.monotonic() - started < 5


@pytest.mark.parametrize("timeout_s", [0.5])
def test_a_trickle_is_cut_like_silence(url: str) -> None:
    connection = begin(url, b"{", 1000)
    sent = 0
    with contextlib.closing(connection), contextlib.suppress(OSError):
        while sent < 100:
            connection.send(b" ")
            sent += 1
            time.sleep(0.05)
    assert sent < 100


def test_chunks_without_a_length_are_bounded(url: str) -> None:
    connection = begin(url, b" " * 30_000)
    assert answer(connection)[0] == 413


def test_a_declared_length_over_the_bound_is_not_waited_for(url: str) -> None:
    connection = begin(url, b"", 10**12)
    assert answer(connection)[0] == 413


def test_all_bodies_together_are_bounded_and_clients_that_leave_give_theirs_back(url: str) -> None:
    def big() -> httpx.Response:
        return httpx.post(url + PATH, content=b" " * 10_000 + BODY, timeout=30)

    slow = [begin(url, b" " * 15_000, 19_000) for _ in range(3)]
    wait_for(lambda: big().status_code == 429, 30, "the refusal")
    assert int(big().headers["retry-after"]) >= 1
    assert httpx.get(url + "/health").status_code == 200
    for connection in slow:
        connection.close()
    wait_for(lambda: big().status_code == 200, 30, "room")


def test_one_keys_bodies_keep_no_others_out(card: ModelCard, tmp_path: Path) -> None:
    """They filled the memory of all for as long as a body may take, and again; others' smallest bodies were refused."""
    secrets = {"eve": new_key(), "alice": new_key()}
    keys_file = tmp_path / "keys.json"
    keys_file.write_text(json.dumps([{"id": name, "sha256": digest(secret)} for name, secret in secrets.items()]))
    config = GatewayConfig(max_body_bytes=20_000, max_bytes_received=50_000, api_keys_file=keys_file)

    def post(url: str, name: str, size: int) -> int:
        headers = {"authorization": f"Bearer {secrets[name]}"}
        return httpx.post(url + PATH, content=b" " * size + BODY, headers=headers, timeout=30).status_code

    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([40])), config)) as url:
        slow = [begin(url, b" " * 15_000, 19_000, authorization=f"Bearer {secrets['eve']}") for _ in range(3)]
        wait_for(lambda: post(url, "eve", 10_000) == 429, 30, "the refusal")
        assert post(url, "alice", 19_000) == 200
        for connection in slow:
            connection.close()


def test_half_a_head_holds_up_nobody(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(50)]
    for connection in idle:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-")
    assert httpx.post(url + PATH, content=BODY).status_code == 200
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "tiny", "prompt": ' + b"[" * 9_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 2_000 + b"]" * 2_000 + b"}",
        b'{"model": "tiny", "x": ' + b'{"a":' * 65 + b"1" + b"}" * 66,
    ],
)
def test_depth_is_refused(url: str, content: bytes) -> None:
    refused = httpx.post(url + PATH, content=content, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert "nested" in refused.json()["error"]["message"]


def test_brackets_in_text_are_not_depth(url: str) -> None:
    for text in ("[" * 100, "{" * 70 + '"' + "[" * 70, "\\" * 9 + '"' + "[" * 70):
        sent = httpx.post(url + PATH, json={"model": "tiny", "prompt": text})
        assert sent.status_code == 200


def test_more_messages_or_ids_than_the_context_has_tokens(url: str) -> None:
    messages = [{"role": "user", "content": ""}] * 300
    for path, fields in (("/v1/chat/completions", {"messages": messages}), (PATH, {"prompt": [40] * 300})):
        refused = httpx.post(url + path, json={"model": "tiny", **fields})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
