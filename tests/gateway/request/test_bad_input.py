"""Bad input, on both doors: a 4xx that names the field, never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import GatewayConfig
from cluster.errors import ContextTooLong, InvalidRequest, MantaError
from gateway.http.errors import status_of
from gateway.json_object import parse_object
from gateway.request.protocol import ChatCompletionRequest, CompletionRequest, parse_body
from gateway.request.validator import Validator
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
LONG = "Hello, my name is Manta. " * 200


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    directory = request.getfixturevalue("tokenizer_directory")
    config = GatewayConfig(max_body_bytes=64 * 1024, max_choices=4)
    with http_server(build_frontend(model_card(directory), ScriptedCoordinator(tokens_script([40])), config)) as url:
        yield url


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [USER, {"role": "king", "content": "Hi"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].tool_call_id"),
    (CHAT, {"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [USER | {"tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0].tool_calls"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [USER, {"role": "system", "content": "late"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    (CHAT, {"model": 7}, "model"),
    (CHAT, {"tools": {}}, "tools"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, "tools[0]"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [{"function": {"name": "f"}}] * 2}, "tools[1].function.name"),
    (CHAT, {"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "tools[0].function.parameters"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": "sometimes"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    (COMPLETIONS, {"response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"response_format": "text"}, "response_format"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 1}, "logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    (CHAT, {"temperature": -0.1}, "temperature"),
    (CHAT, {"temperature": 2.1}, "temperature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"top_p": 1.1}, "top_p"),
    (CHAT, {"top_k": -2}, "top_k"),
    (CHAT, {"top_k": 1.5}, "top_k"),
    (CHAT, {"min_p": 2}, "min_p"),
    (CHAT, {"repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"repetition_penalty": 1e-30}, "repetition_penalty"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias.x"),
    (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias.99999"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"seed": 2**64}, "seed"),
    (CHAT, {"random_seed": "x"}, "random_seed"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 5}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"stop": ["x" * 257]}, "stop[0]"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop": ["a", 5]}, "stop[1]"),
    (CHAT, {"stop_token_ids": [320]}, "stop_token_ids[0]"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 300}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"max_tokens": 1e300}, "max_tokens"),
    (CHAT, {"max_tokens": 10**5000}, "max_tokens"),
    (CHAT, {"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    (CHAT, {"min_tokens": -1}, "min_tokens"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": {"text": "Hi"}}, "prompt"),
    (COMPLETIONS, {"prompt": ["Hi", 3]}, "prompt"),
    (COMPLETIONS, {"prompt": [[5, "x"]]}, "prompt[0][1]"),
    (COMPLETIONS, {"prompt": [[5], [-1]]}, "prompt[1][0]"),
    (COMPLETIONS, {"prompt": [5, 320]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * 256}, "prompt"),
    (COMPLETIONS, {"prompt": LONG}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 5}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 3}, "prompt"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (CHAT, {"echo": "yes"}, "echo"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"messages": [USER | {"prefix": True}]}, "messages[0].prefix"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "prefix": True}, USER]}, "messages[0].prefix"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "x", "prefix": 1}]}, "messages[1].prefix"),
    (
        CHAT,
        {
            "messages": [USER, {"role": "assistant", "content": "x", "prefix": True}],
            "add_generation_prompt": True,
        },
        "add_generation_prompt",
    ),
    (
        CHAT,
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
            "continue_final_message": True,
        },
        "continue_final_message",
    ),
    (CHAT, {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"x": "y" * 30_000}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": dict.fromkeys(map(str, range(65)), 1)}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    (COMPLETIONS, {"echo": "yes"}, "echo"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 0, "echo": True, "prompt": [5] * 257}, "prompt"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
]


@pytest.mark.parametrize(("path", "change", "param"), FIELDS, ids=[f"{f[2]}-{i}" for i, f in enumerate(FIELDS)])
def test_a_wrong_field_is_named(url: str, path: str, change: dict[str, Any], param: str) -> None:
    good = {"model": "tiny", "messages": [USER], "prompt": "Hi"}
    good.pop("prompt" if path == CHAT else "messages")
    body = json.dumps(good | change) if param != "max_tokens" or change["max_tokens"] != 10**5000 else None
    if body is None:  # more digits than Python reads: the body is refused as a whole
        body, param = json.dumps(good)[:-1] + ', "max_tokens": 1' + "0" * 5000 + "}", ""
    response = httpx.post(url + path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"] or "") == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]


def test_a_long_prompt_names_both_numbers(url: str) -> None:
    error = httpx.post(url + COMPLETIONS, json={"model": "tiny", "prompt": [5] * 300}).json()["error"]
    assert "300" in error["message"]
    assert "256" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_a_hopeless_prompt_is_refused_before_it_is_tokenized(tokenizer: HuggingFaceTokenizer) -> None:
    validator = Validator(model_card(Path()), tokenizer, GatewayConfig())
    text = "x" * 8_000_000
    chat = parse_body(
        ChatCompletionRequest, {"model": "tiny", "messages": [{"role": "user", "content": text}]}, len(text)
    )
    with pytest.raises(ContextTooLong, match="at least") as refused:
        validator.chat(chat)
    assert refused.value.param == "messages"
    with pytest.raises(ContextTooLong, match="at least") as refused:
        validator.completion(parse_body(CompletionRequest, {"model": "tiny", "prompt": ["x", text]}, len(text)))
    assert refused.value.param == "prompt[1]"


BODIES: list[tuple[bytes, dict[str, str], int]] = [
    (b"", {}, 400),
    (b"{", {}, 400),
    (b"[]", {}, 400),
    (b"null", {}, 400),
    (b'"x"', {}, 400),
    (b"\xff\xfe", {}, 400),
    (b'{"model": NaN}', {}, 400),
    (b'{"model": "tiny", "\\ud800": 1}', {}, 400),
    (b'{"a":' * 13_000, {}, 400),
    (b"[" * 60_000, {}, 400),
    (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", {}, 400),
    (b"{}", {"content-type": "text/plain"}, 400),
    (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 400),
    (b"x" * 65 * 1024, {}, 413),
    (b'{"model": "absent", "messages": [{"role": "user", "content": "Hi"}]}', {}, 404),
]


@pytest.mark.parametrize(("body", "headers", "status"), BODIES, ids=range(len(BODIES)))
def test_a_wrong_body(url: str, body: bytes, headers: dict[str, str], status: int) -> None:
    response = httpx.post(url + CHAT, content=body, headers={"content-type": "application/json", **headers})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"NaN", "expected a JSON value: line 1 column 7"),
        (b"-Infinity", "no digit after sign: line 1 column 8"),
        (b"1e400", "number is infinity"),
        (b"1" * 400, "number is infinity"),
        (b'"\\ud800"', "no low surrogate in string: line 1 column 8"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'"\xff"', "not valid UTF-8"),
        (b'"\xed\xa0\x80"', "not valid UTF-8"),  # a lone surrogate, as bytes
        (b'"\n"', "control character"),
        (b"1 x", "line 1 column 9"),
    ],
)
def test_what_is_no_json_is_told_where(value: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match="the body is not valid JSON: ") as refused:
        parse_object(b'{"a": ' + value + b"}")
    assert said in str(refused.value)


def test_whole_numbers_past_64_bits_are_the_nearest_fractions() -> None:
    assert parse_object(b'{"a": [18446744073709551615, 18446744073709551617, 1, 1, 1e2], "b": 1, "b": 2}') == {
        "a": [2**64 - 1, float(2**64), 1, 1, 100.0],
        "b": 2,
    }


def test_a_chunked_body_is_bounded_while_it_is_read(url: str) -> None:
    response = httpx.post(url + CHAT, content=iter([b"x" * 1024] * 100), headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    "change",
    [
        {"stop": None, "tools": None, "tool_choice": "auto", "response_format": {"type": "text"}, "user": "me"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
        {"messages": [USER, {"role": "assistant", "content": None}, USER]},
        {"messages": [{"role": "user", "content": "nul \x00 byte"}]},
        {"temperature": 0, "seed": -1, "top_k": -1, "random_seed": 3, "safe_prompt": False, "stop": "x"},
        {"unheard_of": {"deep": [1, 2, 3]}},
    ],
)
def test_what_is_harmless_is_tolerated(url: str, change: dict[str, Any]) -> None:
    response = httpx.post(url + CHAT, json={"model": "tiny", "messages": [USER]} | change)
    assert response.status_code == 200, response.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "tools", "echo", "tool_choice"})
)


@settings(max_examples=500, deadline=None)
@given(change=st.dictionaries(NAMES, JSON, max_size=3), chat=st.booleans())
def test_any_json_is_a_generation_or_a_4xx(tokenizer: HuggingFaceTokenizer, change: dict[str, Any], chat: bool) -> None:
    validator = Validator(model_card(Path()), tokenizer, GatewayConfig())
    good = {"model": "tiny", "messages": [USER], "prompt": "Hi"}
    try:
        document = parse_object(json.dumps(good | change).encode())
        if chat:
            validator.chat(parse_body(ChatCompletionRequest, document, 0))
        else:
            validator.completion(parse_body(CompletionRequest, document, 0))
    except MantaError as error:
        status = status_of(error)[0]
    else:
        status = 200
    assert status < 500
