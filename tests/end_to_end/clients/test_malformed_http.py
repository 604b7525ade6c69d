"""Whatever a client sends to the HTTP door, an answer that is an error has the one shape of all errors."""

from __future__ import annotations

import gzip

import httpx
import pytest

from tests.raw_http import MALFORMED, WEBSOCKET, check_error, exchange

CHAT = b'{"model": "manta-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}'


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_request_has_an_error_like_any_other(server, what: str) -> None:
    """HAProxy answered in HTML, and uvicorn behind it in plain text."""
    request, status, _ = MALFORMED[what]
    answer = exchange(int(server.url.rpartition(":")[2]), request)
    assert answer[0] == status
    if status >= 400:
        check_error(*answer)


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, deflate"])
def test_a_compressed_body_is_refused_by_name(server, coding: str) -> None:
    """It was read as text, and refused for that."""
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=gzip.compress(CHAT), headers=headers, timeout=60)
    assert answer.status_code == 415
    assert answer.json()["error"]["param"] == "Content-Encoding"
    plain = {**headers, "content-encoding": "identity"}
    assert httpx.post(f"{server.url}/v1/chat/completions", content=CHAT, headers=plain, timeout=60).status_code == 200


def test_a_websocket_is_refused_like_any_other_path(server) -> None:
    answer = exchange(int(server.url.rpartition(":")[2]), WEBSOCKET)
    assert answer[0] == 403
    check_error(*answer)
