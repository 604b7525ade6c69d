"""Headers by which a client would steer Ray Serve do nothing, and request ids are echoed once."""

from __future__ import annotations

import socket

import httpx
import pytest

CHAT = {"model": "manta-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
FOR_EVER = CHAT | {"max_tokens": 30_000, "ignore_eos": True}  # nearly the context
COMMANDS = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}


def test_a_safe_request_id_is_echoed_and_ours_is_another(server):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"}, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert answer.headers["x-manta-request-id"] == answer.json()["id"]


@pytest.mark.parametrize("request_id", ["x" * 200, "a b", "ü".encode(), None])
def test_any_other_is_replaced(server, request_id):
    headers = {} if request_id is None else {"x-request-id": request_id}
    answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60)
    assert answer.status_code == 200
    [given] = answer.headers.get_list("x-request-id")
    assert len(given) == 32


@pytest.mark.parametrize("timeout", ["0.000001", "nan", "x", "-1", "1e999"])
def test_a_client_cannot_set_serves_timeout(server, timeout):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=CHAT, headers={"x-request-timeout-seconds": timeout}, timeout=60
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_asks_to_be_left_alone_is_still_noticed_when_it_goes(server, wait_until_idle, stream):
    with httpx.Client(base_url=server.url) as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json=FOR_EVER | {"stream": True}, headers=COMMANDS) as it:
                next(it.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=FOR_EVER, headers=COMMANDS, timeout=1)
    wait_until_idle(5.0)


def test_headers_that_are_no_text_are_no_error_of_the_server(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    for line in (b"x-name: \xff\xfe", b"x-request-id: \xff", b"x-request-timeout-seconds: \xff"):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = b"GET /version HTTP/1.1\r\nhost: " + f"{host}:{port}".encode() + b"\r\nconnection: close\r\n"
            connection.sendall(head + line + b"\r\n\r\n")
            status = int(connection.recv(4096).split()[1])
        assert status < 500
