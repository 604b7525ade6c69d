"""What the log says of requests, and what it must never say: keys, prompts, answers."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.errors import Unavailable
from cluster.messages import ModelCard
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.telemetry.logs import JsonFormatter, TextFormatter
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, http_server, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.raw_http import asking
from tests.waiting import wait_for

SECRETS = ("sk-secret-key", "sk-wrong-key", "the prompt's own words", "Hello STOP", "made-up-model")


@pytest.fixture(params=[JsonFormatter(), TextFormatter()], ids=["json", "text"])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """All that the gateway logs, as a replica would write it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param)
    gateway = logging.getLogger("gateway")
    gateway.addHandler(handler)
    gateway.setLevel(logging.DEBUG)
    yield stream
    gateway.removeHandler(handler)
    gateway.setLevel(logging.NOTSET)
    assert not [secret for secret in SECRETS if secret in stream.getvalue()]


def lines(written: io.StringIO, count: int) -> list[dict[str, Any]]:
    """The lines of requests, once there are so many: an answer arrives a moment before its line is written."""

    def found() -> list[str]:
        return [line for line in written.getvalue().splitlines() if "gateway.requests" in line]

    wait_for(lambda: len(found()) >= count, 60, f"{count} lines")
    text = found()
    assert len(text) == count, text
    if text[0].startswith("{"):
        return [json.loads(line) for line in text]
    return [dict(pair.split("=") for pair in line.split(": request ", 1)[1].split()) for line in text]


def keyed(tmp_path: Path) -> GatewayConfig:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'- {{id: alice, sha256: "{hashlib.sha256(SECRETS[0].encode()).hexdigest()}"}}\n')
    return GatewayConfig(api_keys_file=str(keys))


def test_a_line_per_request_without_what_is_private(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, written: io.StringIO, tmp_path: Path
) -> None:
    tokens = tokenizer.encode(SECRETS[3])[1:]
    coordinator = ScriptedCoordinator(tokens_script(tokens, queue_s=0.25))
    body = {"model": "tiny-latest", "messages": [{"role": "user", "content": SECRETS[2]}]}
    right, wrong = ({"authorization": f"Bearer {key}"} for key in SECRETS[:2])
    with http_server(build_frontend(card, coordinator, keyed(tmp_path))) as url:
        url += "/v1/chat/completions"
        answer = httpx.post(url, json=body, headers=right)
        httpx.post(url, json=body | {"stream": True}, headers=right)
        for changes in ({"temperature": SECRETS[2]}, {"model": SECRETS[4]}, {SECRETS[2]: 1, "max_tokens": 9999}):
            assert httpx.post(url, json=body | changes, headers=right).status_code >= 400
        assert httpx.post(url, json=body, headers=wrong).status_code == 401
        httpx.get(url.replace("chat", f"{SECRETS[4]}?key={SECRETS[0]}"), headers=right)
        httpx.get(url.replace("/v1/chat/completions", "/health"))
        first, second, *refused = lines(written, 7)
    usage = answer.json()["usage"]
    assert first["request_id"] == answer.json()["id"]
    for line in (first, second):
        assert (line["door"], line["route"], line["model"]) == ("http", "/v1/chat/completions", "tiny")
        assert (line["status"], line["key_id"]) == ("200", "alice")
        assert int(line["prompt_tokens"]) == usage["prompt_tokens"]
        assert int(line["completion_tokens"]) == usage["completion_tokens"]
        assert float(line["queue_s"]) == 0.25
        assert 0 < float(line["time_to_first_token_s"]) <= float(line["duration_s"])
        assert "error" not in line
    assert second["request_id"] != first["request_id"]
    assert [line["status"] for line in refused] == ["400", "404", "400", "401", "404"]
    assert refused[0]["error"] == "InvalidRequest"
    assert "key_id" not in refused[3]


def test_failures_have_their_name(card: ModelCard, tokenizer: HuggingFaceTokenizer, written: io.StringIO) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": SECRETS[2]}], "stream": True}
    for script in (
        failing_script(tokenizer.encode("a")[1:], Unavailable("gone")),
        failing_script([], Unavailable("x")),
    ):
        with http_server(build_frontend(card, ScriptedCoordinator(script))) as url:
            httpx.post(url + "/v1/chat/completions", json=body)
    coordinator = ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.1, eos=None))
    with http_server(build_frontend(card, coordinator)) as url:
        with asking(url, "/v1/chat/completions", body | {"stream": False}):
            wait_for(lambda: coordinator.num_taken > 0, 60, "a token")
        begun, failed, left = lines(written, 3)
    assert (begun["status"], begun["error"]) == ("200", "Unavailable")
    assert (failed["status"], failed["error"]) == ("503", "Unavailable")
    assert left["error"] == "RequestCancelled"
    assert int(left["completion_tokens"]) > 0


def test_calls_over_grpc_have_their_line(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, written: io.StringIO
) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(SECRETS[3])[1:]))
    request = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content=SECRETS[2])])
    with grpc_server(build_frontend(card, coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.Chat(request)
        list(stub.ChatStream(request))
        with pytest.raises(grpc.RpcError):
            stub.Chat(chat_pb2.ChatRequest(model=SECRETS[4]))
        coordinator._script = tokens_script([40] * 200, pause_s=0.1, eos=None)
        leaving = stub.ChatStream(request)
        next(leaving)
        leaving.cancel()
        whole, streamed, unknown, left = lines(written, 4)
    assert whole["request_id"] == answer.id
    assert [line["route"] for line in (whole, streamed, unknown)] == ["Chat", "ChatStream", "Chat"]
    assert [line["status"] for line in (whole, streamed, unknown)] == ["OK", "OK", "NOT_FOUND"]
    assert int(streamed["completion_tokens"]) == answer.usage.completion_tokens
    assert left["error"] == "RequestCancelled"


def test_the_small_calls_over_grpc_have_their_line_too(card: ModelCard, written: io.StringIO) -> None:
    with grpc_server(build_frontend(card, ScriptedCoordinator(tokens_script([40])))) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        _, call = stub.Tokenize.with_call(chat_pb2.TokenizeRequest(model="tiny", text=SECRETS[2]))
        with pytest.raises(grpc.RpcError):
            stub.Detokenize(chat_pb2.DetokenizeRequest(model="tiny", token_ids=[10**6]))
        stub.ListModels(chat_pb2.ListModelsRequest())
        tokenized, refused, listed = lines(written, 3)
    assert tokenized["request_id"] == dict(call.trailing_metadata())["x-request-id"]
    assert [line["route"] for line in (tokenized, refused, listed)] == ["Tokenize", "Detokenize", "ListModels"]
    assert [line["status"] for line in (tokenized, refused, listed)] == ["OK", "INVALID_ARGUMENT", "OK"]
