"""Whatever a client sends, it gets a 4xx that names the field, and the server goes on."""

import httpx
import pytest

CHAT = {"model": "manta-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"n": 10**6}, 400, "n"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"stop": [1]}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "word " * 60000}]}, 400, "messages"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, 400, "tools[0].function.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            400,
            "response_format",
        ),
    ],
)
def test_a_wrong_field_is_named(server, change, status, param):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **change}, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"\xff\xfe{}", {}, 400),
        (b'{"model": "manta-demo", "messages": "' + b"[" * 100_000, {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"model=manta-demo", {"content-type": "application/x-www-form-urlencoded"}, 400),
        (b" " * (9 * 2**20), {}, 413),
    ],
)
def test_a_wrong_body_is_refused(server, content, headers, status):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
        timeout=60,
    )
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_an_unknown_route_and_method(server):
    assert httpx.get(f"{server.url}/v1/nothing").status_code == 404
    assert httpx.delete(f"{server.url}/v1/models").status_code == 405


def test_the_server_still_answers(server):
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
