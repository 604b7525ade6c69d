"""Fields of every dialect: what is honoured, what is ignored, what is refused by name, and whose model answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidRequest
from gateway.coordinators.health import Health
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.request.foreign_fields import IGNORED, INSTEAD, REFUSED, REFUSED_IN_MESSAGE
from gateway.request.prompts import SAFE_PROMPT
from gateway.request.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from gateway.request.validator import Validator
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, ready, tokens_script
from tests.gateway.grpc.test_grpc import USER, grpc_server
from tests.gateway.http.test_http import sse

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PATHS = ("/v1/chat/completions", "/v1/completions")
WRONG = dict.fromkeys(("regex", "guided_regex"), "(")  # of fields that take any other text


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40, 41, 42]))


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, coordinator: ScriptedCoordinator) -> Iterator[str]:
    card = model_card(request.getfixturevalue("tokenizer_directory"), max_model_len=512)
    config = GatewayConfig(accept_any_model=True, force_usage=True)
    with http_server(build_frontend(card, coordinator, config)) as url:
        yield url


def test_refused_fields_are_named_and_what_asks_for_nothing_passes(tokenizer: HuggingFaceTokenizer) -> None:
    """`typical_p`, `grammar`, `max_new_tokens` and a hundred more of other servers were passed over."""
    validator = Validator(model_card(Path()), tokenizer, GatewayConfig())

    def ask_chat(name: str, value: object) -> None:
        validator.chat(parse_body(ChatCompletionRequest, CHAT | {name: value}, 0))

    def ask_completion(name: str, value: object) -> None:
        validator.completion(parse_body(CompletionRequest, CHAT | {"prompt": "Hi", name: value}, 0))

    for ask, known in ((ask_chat, ChatCompletionRequest), (ask_completion, CompletionRequest)):
        for name, harmless in REFUSED.items():
            with pytest.raises(InvalidRequest) as refused:
                ask(name, WRONG.get(name, "something else"))
            assert refused.value.param == name
            assert name in known.model_fields or INSTEAD.get(name, "") in refused.value.message
            for value in (None, *harmless):
                ask(name, value)
    for name in ("mirostat", "typical_p", "repeat_penalty"):
        [value] = REFUSED[name]
        ask_chat(name, float(value))
        with pytest.raises(InvalidRequest):
            ask_chat(name, bool(value))
    assert not IGNORED & REFUSED.keys()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("typical_p", 0.9),  # llama.cpp, TGI
        ("dry_multiplier", 0.8),  # llama.cpp
        ("stop_regex", "[0-9]"),  # SGLang
        ("bad_words", ["x"]),  # vLLM
        ("watermark", True),  # TGI
        ("options", {"num_predict": 1}),  # Ollama
    ],
)
def test_each_dialect_is_told_by_name(url: str, path: str, field: str, value: object) -> None:
    error = httpx.post(url + path, json=CHAT | {"prompt": "Hi", field: value}).json()["error"]
    assert (error["param"], error["type"]) == (field, "invalid_request_error")


def test_fields_of_messages_are_refused_by_their_path(url: str) -> None:
    """Mistral's `prefix` was passed over: the answer began anew behind what it should have gone on from."""

    def ask(**fields: object) -> httpx.Response:
        messages = [*CHAT["messages"], {"role": "assistant", "content": "Well", **fields}, *CHAT["messages"]]
        return httpx.post(url + PATHS[0], json=CHAT | {"messages": messages})

    for name, harmless in REFUSED_IN_MESSAGE.items():
        refused = ask(**{name: True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"messages[1].{name}")
        for value in (None, *harmless):
            assert ask(**{name: value}).status_code == 200
    assert ask(refusal=None, annotations=[], weight=1).status_code == 200, "others change nothing"


@pytest.mark.parametrize("path", PATHS)
def test_fields_that_change_nothing_are_ignored(url: str, path: str) -> None:
    everything = CHAT | {"prompt": "Hi"} | {name: {"any": ["thing"]} for name in IGNORED}
    assert httpx.post(url + path, json=everything).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_completion_tokens", 1, ("max_tokens", 1)),
        ("min_tokens", 1, ("min_tokens", 1)),
        ("ignore_eos", True, ("ignore_eos", True)),
        ("top_k", 7, ("top_k", 7)),
        ("min_p", 0.25, ("min_p", 0.25)),
        ("repetition_penalty", 1.5, ("repetition_penalty", 1.5)),
        ("stop", None, ("max_tokens", 2)),
        ("stop", "x", ("max_tokens", 2)),
        ("stop", ["x", "y"], ("max_tokens", 2)),
        ("stop", [], ("max_tokens", 2)),
        ("stop", "", ("max_tokens", 2)),
        ("max_tokens", 1.0, ("max_tokens", 1)),  # some languages have no other numbers
        ("top_k", 7.0, ("top_k", 7)),
        ("stop_token_ids", [5.0, 6], ("stop_token_ids", (5, 6))),
        ("top_p", 0, ("temperature", 0.0)),
        ("top_p", 0.0, ("top_p", 1.0)),
    ],
)
def test_sampling_fields_reach_the_coordinator(
    url: str, coordinator: ScriptedCoordinator, field: str, value: object, expected: tuple[str, object]
) -> None:
    assert httpx.post(url + PATHS[0], json=CHAT | {field: value}).status_code == 200
    assert getattr(coordinator.requests[-1].sampling, expected[0]) == expected[1]


def test_an_empty_stop_string_stops_nothing(url: str) -> None:
    """Peers pass it over; it was an error."""
    whole = httpx.post(url + PATHS[0], json=CHAT).json()["choices"][0]
    for stop in ("", [""], ["", "absent"]):
        assert httpx.post(url + PATHS[0], json=CHAT | {"stop": stop}).json()["choices"][0] == whole


def test_as_many_choices_as_openai_gives(url: str, coordinator: ScriptedCoordinator) -> None:
    answer = httpx.post(url + PATHS[0], json=CHAT | {"n": 128}, timeout=60)
    assert len(answer.json()["choices"]) == 128
    assert len({request.choice_index for request in coordinator.requests[-128:]}) == 128
    error = httpx.post(url + PATHS[0], json=CHAT | {"n": 129}).json()["error"]
    assert (error["param"], error["message"]) == ("n", "n: must be between 1 and 128, got 129")


def test_both_names_of_the_seed(url: str, coordinator: ScriptedCoordinator) -> None:
    for field in ("seed", "random_seed"):
        assert httpx.post(url + PATHS[0], json=CHAT | {field: 11}).status_code == 200
        assert coordinator.requests[-1].seed == 11


def test_safe_prompt_comes_before_the_conversation(
    url: str, coordinator: ScriptedCoordinator, tokenizer: HuggingFaceTokenizer
) -> None:
    system = {"role": "system", "content": "Be brief."}
    for messages in (CHAT["messages"], [system, *CHAT["messages"]]):
        assert httpx.post(url + PATHS[0], json=CHAT | {"messages": messages, "safe_prompt": True}).status_code == 200
        prompt = tokenizer.decode(coordinator.requests[-1].prompt_token_ids)
        assert prompt.startswith("<s>" + SAFE_PROMPT)
        assert ("Be brief." in prompt) == (system in messages)


def test_the_prompts_ids_come_with_the_answers(url: str, coordinator: ScriptedCoordinator) -> None:
    asked = CHAT | {"return_token_ids": True, "n": 2}
    whole = httpx.post(url + PATHS[0], json=asked).json()
    prompt = list(coordinator.requests[-1].prompt_token_ids)
    assert whole["prompt_token_ids"] == prompt
    chunks = sse(httpx.post(url + PATHS[0], json=asked | {"stream": True}).text)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)


def test_any_model_name_is_answered_by_the_first_model(url: str) -> None:
    answer = httpx.post(url + PATHS[0], json=CHAT | {"model": "gpt-4o"})
    assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
    model = httpx.get(url + "/v1/models/gpt-4o").json()
    assert (model["id"], model["root"]) == ("gpt-4o", "tiny")
    assert httpx.post(url + PATHS[0], json=_without_model(CHAT)).json()["model"] == "tiny"


def _without_model(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "model"}


def test_without_a_model_the_only_one_answers(tokenizer_directory: Path) -> None:
    """At both doors. Of several, a request says which."""

    def answers(*names: str) -> Iterator[str]:
        cards = tuple(model_card(tokenizer_directory, name=name, aliases=(), application=name) for name in names)
        tokenizer, coordinator = HuggingFaceTokenizer(tokenizer_directory), ScriptedCoordinator(tokens_script([40]))
        frontend = Frontend(
            GatewayConfig(),
            cards,
            dict.fromkeys(names, tokenizer),
            dict.fromkeys(names, coordinator),
            Health(cards, ready),
        )
        with http_server(frontend) as url:
            bodies = dict.fromkeys(PATHS, _without_model(CHAT) | {"prompt": "Hi"}) | {"/v1/responses": {"input": "Hi"}}
            for path, body in bodies.items():
                document = httpx.post(url + path, json=body).json()
                yield document.get("model") or "400 " + document["error"]["param"]
        with grpc_server(frontend) as channel:
            stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
            if len(names) == 1:
                yield stub.Chat(chat_pb2.ChatRequest(messages=USER), timeout=30).model
            else:
                with pytest.raises(grpc.RpcError, match="model: field required; served are: one, two"):
                    stub.Chat(chat_pb2.ChatRequest(messages=USER), timeout=30)

    assert set(answers("one")) == {"one"}
    assert set(answers("one", "two")) == {"400 model"}


@pytest.mark.parametrize("path", PATHS)
def test_forced_usage_ends_every_stream(url: str, path: str) -> None:
    chunks = sse(httpx.post(url + path, json=CHAT | {"prompt": "Hi", "stream": True}).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    for chunk in chunks[:-1]:
        assert chunk["id"]
        assert chunk["model"] == "tiny"
        [choice] = chunk["choices"]
        assert {"index", "finish_reason"} < set(choice)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_a_stream_is_an_event_stream_whatever_is_accepted(url: str) -> None:
    for accept in ("application/json", "text/plain", "*/*"):
        answer = httpx.post(url + PATHS[0], json=CHAT | {"stream": True}, headers={"accept": accept})
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.text.endswith("data: [DONE]\n\n")
