"""The HTTP door over a real socket, driven by openai's own client and by httpx."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product
from typing import Any

import httpx
import openai
import pytest

from cluster.config import GatewayConfig
from cluster.errors import Overloaded, StepFailed, Unavailable
from cluster.messages import ModelCard, Request, TokenChunk
from gateway.coordinators.health import ModelHealth
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    failing_script,
    http_server,
    tokens_script,
)
from tests.waiting import wait_for

ANSWER = "Grüße 👩‍🚀, 你好. é STOP here"
USER: Any = [{"role": "user", "content": "Hello"}]


def test_streamed_chat_is_the_whole_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=USER)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.id.startswith("chatcmpl-")
    assert whole.usage is not None
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_completion_in_every_prompt_shape(client: openai.OpenAI, tokenizer: HuggingFaceTokenizer) -> None:
    ids = list(tokenizer.encode("Hello"))
    for prompt, count in (("Hello", 1), (["Hello", "STOP"], 2), (ids, 1), ([ids, ids, ids], 3)):
        answer = client.completions.create(model="tiny-latest", prompt=prompt)  # type: ignore[arg-type]
        assert [choice.text for choice in answer.choices] == [ANSWER] * count
        streamed: dict[int, str] = {}
        for chunk in client.completions.create(model="tiny", prompt=prompt, stream=True):  # type: ignore[arg-type]
            streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
        assert streamed == dict.fromkeys(range(count), ANSWER)


def test_several_choices_share_a_request_id_and_a_seed(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]
) -> None:
    door[1].requests.clear()
    answer = client.chat.completions.create(model="tiny", messages=USER, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    assert sorted(r.choice_index for r in door[1].requests) == [0, 1, 2]
    assert {(r.request_id, r.seed) for r in door[1].requests} == {(answer.id, 7)}
    assert answer.usage is not None
    assert answer.usage.completion_tokens % 3 == 0


def test_token_ids_and_logprobs_cover_every_token(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    expected = [*tokenizer.encode(ANSWER)[1:], 1]
    fields = {"model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = httpx.post(door[0] + "/v1/chat/completions", json=fields).json()["choices"][0]
    assert whole["token_ids"] == expected
    assert [len(entry["top_logprobs"]) for entry in whole["logprobs"]["content"]] == [2] * len(expected)
    spelled = b"".join(bytes(entry["bytes"] or ()) for entry in whole["logprobs"]["content"])
    assert spelled.decode() == ANSWER, "as much as the text has"
    end = whole["logprobs"]["content"][-1]
    assert (end["token"], end["bytes"]) == ("</s>", None), "a special token, which the text has nothing of"
    chunks = sse(httpx.post(door[0] + "/v1/chat/completions", json=fields | {"stream": True}).text)
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == expected
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks)
    legacy = client.completions.create(model="tiny", prompt="Hello", logprobs=1)
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.token_logprobs == [-0.25] * len(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_have_no_bytes_in_log_probabilities(
    door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer, stream: bool
) -> None:
    """They had those of their spelling, and the bytes of all tokens were no longer those of the text."""
    fields = {"model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 3, "stream": stream}
    answer = httpx.post(door[0] + "/v1/chat/completions", json=fields)
    choices = [body["choices"][0] for body in (sse(answer.text) if stream else [answer.json()])]
    entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"] or ()) for entry in entries).decode() == ANSWER
    assert {(entry["token"], entry["bytes"] is None) for entry in entries[-1:]} == {("</s>", True)}
    for entry in entries:  # <s> and </s> are among the candidates, as is a token of one byte
        assert [top["bytes"] is None for top in entry["top_logprobs"]] == [True, True, False]
    asked = {"model": "tiny", "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    told = httpx.post(door[0] + "/v1/responses", json=asked).json()["output"][0]["content"][0]["logprobs"]
    assert all([top["bytes"] for top in entry["top_logprobs"]][:2] == [[], []] for entry in told)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_called_by_their_ids_where_that_is_asked_for(
    door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer, stream: bool
) -> None:
    """Two tokens may have one text: half a character each is U+FFFD."""
    expected = [f"token_id:{i}" for i in (*tokenizer.encode(ANSWER)[1:], 1)]
    asked = {"model": "tiny", "stream": stream, "return_tokens_as_token_ids": True}

    def choices(path: str, **fields: Any) -> list[Any]:
        answer = httpx.post(door[0] + path, json=asked | fields)
        bodies = sse(answer.text) if stream else [answer.json()]
        return [body["choices"][0] for body in bodies]

    chat = choices("/v1/chat/completions", messages=USER, logprobs=True, top_logprobs=1)
    entries = [entry for choice in chat for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == expected
    assert {entry["top_logprobs"][0]["token"] for entry in entries} == {"token_id:0"}
    legacy = choices("/v1/completions", prompt="Hello", logprobs=1)
    assert [token for choice in legacy for token in choice["logprobs"]["tokens"]] == expected
    tops = [top for choice in legacy for top in choice["logprobs"]["top_logprobs"]]
    assert [set(top) for top in tops] == [{"token_id:0", token} for token in expected]


def test_stop_string_cuts_and_aborts(client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]) -> None:
    cut = ANSWER[: ANSWER.index("STOP")]
    for stop in ("STOP", ["absent", "STOP"]):
        whole = client.chat.completions.create(model="tiny", messages=USER, stop=stop)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (cut, "stop")
        stream = client.chat.completions.create(model="tiny", messages=USER, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut
    assert door[1].running == 0


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_models_and_version(client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-latest"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="tiny-latest"):
        client.models.retrieve("absent")
    assert httpx.get(door[0] + "/health").json()["status"] == "ok"
    assert httpx.get(door[0] + "/version").json()["version"]


def test_monitors_may_ask_with_head(door: tuple[str, ScriptedCoordinator]) -> None:
    for path in ("/health", "/", "/version"):
        answer, whole = httpx.head(door[0] + path), httpx.get(door[0] + path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == whole.headers["content-type"]


def test_unknown_routes_and_methods(door: tuple[str, ScriptedCoordinator]) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        response = httpx.request(method, door[0] + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_strange_paths_and_the_schema(door: tuple[str, ScriptedCoordinator]) -> None:
    assert httpx.get(door[0] + "/openapi.json").status_code == 200
    for path in ("/v1/models/%ff%00", "/v1/models/a%2Fb", "/%ff", "/v1//models"):
        assert httpx.get(door[0] + path).status_code == 404
    assert httpx.request("GET", door[0] + "/v1/models", json={"a": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_sequences_at_once(card: ModelCard, stream: bool) -> None:
    """Whatever it asks for about that: within 250 ms is promised."""
    coordinator = ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.5, eos=None))
    body = json.dumps({"model": "tiny", "messages": USER, "stream": stream, "n": 2})
    headers = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}
    with http_server(build_frontend(card, coordinator)) as url:
        client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers})
        wait_for(lambda: coordinator.running == 2, 60, "its sequences")
        if stream:
            assert client.getresponse().read(1), "it has begun to read"
        left = time.monotonic()
        client.close()
        wait_for(lambda: coordinator.running == 0, 60, "the end of its sequences")
        assert max(coordinator.closed_at) - left < 10, "their tokens would take 100 s"


def test_errors_before_the_first_token_are_plain_answers(card: ModelCard) -> None:
    cases = ((Overloaded("full", retry_after_s=3), 429, "3"), (Unavailable("gone"), 503, "1"), (KeyError("x"), 500, ""))
    for (error, status, retry_after), stream in product(cases, (False, True)):
        with http_server(build_frontend(card, ScriptedCoordinator(failing_script([], error)))) as url:
            response = httpx.post(
                url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, "stream": stream}
            )
            assert response.status_code == status
            assert response.headers.get("retry-after", "") == retry_after
            assert response.headers["x-manta-request-id"].startswith("chatcmpl-")
            assert "Traceback" not in response.text


@pytest.mark.parametrize("tokens", [[], [72]], ids=["before the first token", "after it"])
def test_a_request_that_every_coordinator_fails_with_is_500_and_named(card: ModelCard, tokens: list[int]) -> None:
    """It is tried three times in all; the client gets an id, and nothing of what was raised."""
    for stream in (False, True):
        coordinator = ScriptedCoordinator(failing_script(tokens, StepFailed("failed (KeyError)", "replica")))
        with http_server(build_frontend(card, coordinator)) as url:
            response = httpx.post(
                url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, "stream": stream}
            )
        request_id = response.headers["x-manta-request-id"]
        error = sse(response.text, done=False)[-1]["error"] if stream and tokens else response.json()["error"]
        assert response.status_code == (200 if stream and tokens else 500)
        assert error["type"] == "internal_error"
        assert request_id in error["message"]
        assert "KeyError" not in response.text
        assert "Traceback" not in response.text
        assert len(coordinator.requests) == 3


def test_an_error_mid_stream_is_an_event_and_the_end(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(failing_script(tokenizer.encode("Hello")[1:], Unavailable("an expert is gone")))
    with http_server(build_frontend(card, coordinator)) as url:
        response = httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, "stream": True})
        events = sse(response.text, done=False)
        assert events[-1]["error"]["message"] == "an expert is gone"
        assert all(event["choices"][0]["finish_reason"] is None for event in events[:-1])
        with (
            openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.APIError, match="an expert is gone"),
        ):
            list(client.chat.completions.create(model="tiny", messages=USER, stream=True))


def test_a_stream_that_ends_early_never_looks_complete(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        yield TokenChunk(request.request_id, request.choice_index, 0, tokenizer.encode("Hello")[1:])

    with http_server(build_frontend(card, ScriptedCoordinator(script))) as url:
        body = {"model": "tiny", "messages": USER}
        assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 503
        text = httpx.post(url + "/v1/chat/completions", json=body | {"stream": True}).text
        assert "error" in sse(text, done=False)[-1]


@pytest.mark.parametrize("revision", [None, "5c79a376139be989ef1838f360bf4f1f256d7aec"])
def test_models_are_listed_with_the_hubs_commit(card: ModelCard, revision: str | None) -> None:
    coordinator = ScriptedCoordinator(tokens_script([]))
    with http_server(build_frontend(replace(card, revision=revision), coordinator)) as url:
        assert [model["revision"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == [revision] * 2
        assert httpx.get(f"{url}/v1/models/tiny").json()["revision"] == revision


def test_a_loading_model_is_503_with_its_phase(card: ModelCard) -> None:
    phase = ModelHealth("loading", ("expert-0",), 10, 20)

    def probe(cards: Any) -> dict[str, ModelHealth]:
        return {card.application: phase for card in cards}

    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([])), probe=probe)) as url:
        health = httpx.get(url + "/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert health.json()["models"]["tiny"]["loaded_bytes"] == 10
        response = httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_loading"
        assert int(response.headers["retry-after"]) >= 1


def test_the_deadline_ends_a_request(card: ModelCard) -> None:
    coordinator = ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.5, eos=None))
    config = GatewayConfig(request_timeout_s=0.3)
    with http_server(build_frontend(card, coordinator, config)) as url:
        started = time.monotonic()
        response = httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - started < 20, "the tokens would take 100 s"
        assert coordinator.running == 0


def test_past_the_bound_is_429(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello " * 9)[1:], pause_s=0.1, eos=None))
    config = GatewayConfig(max_ongoing_requests=1)
    body = {"model": "tiny", "messages": USER, "stream": True}
    with (
        http_server(build_frontend(card, coordinator, config)) as url,
        httpx.stream("POST", url + "/v1/chat/completions", json=body) as response,
    ):
        chunks = response.iter_bytes()  # kept: httpx hangs up when it is collected
        next(chunks)
        refused = httpx.post(url + "/v1/chat/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1


def sse(text: str, *, done: bool = True) -> list[dict[str, Any]]:
    """The events of a stream, whose framing is checked to the byte."""
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    if done:
        assert events.pop() == "data: [DONE]"
    else:
        assert events[-1] != "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]
