"""Calls of tools as they are written: piece by piece, cut, and beside stop strings; at every door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.messages import ModelCard, TokenChunk
from gateway.answer.calls import ToolCall, joined
from gateway.answer.choice import Choice, Usage
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.request.protocol import ChatCompletionRequest, parse_body
from gateway.text.detokenizer import detokenize
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    http_server,
    model_card,
    tokens_script,
    write_tokenizer,
)
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.request.test_tools import ID, SPELLING_TEMPLATE, TIME, TWO_CALLS, USER, WEATHER

ASKED: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER, TIME]}
ARGUMENTS = '{"city": "P\\"a}r]is é"}'
SPELLED_CALLS = f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}"


@pytest.fixture(scope="module", params=["listed", "spelled"])
def calls(
    request: pytest.FixtureRequest,
    tokenizer: HuggingFaceTokenizer,
    tokenizer_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Frontend, list[int]]:
    """A gateway whose model calls both tools, in text or in special tokens; and the tokens that it says."""
    directory, text = tokenizer_directory, TWO_CALLS
    if request.param == "spelled":
        directory, text = tmp_path_factory.mktemp("spelled"), SPELLED_CALLS
        write_tokenizer(directory, chat_template=SPELLING_TEMPLATE, special=["[TOOL_CALLS]", "[ARGS]"])
        tokenizer = HuggingFaceTokenizer(directory)
    token_ids = list(tokenizer.encode(text)[1:])
    card = model_card(directory, max_model_len=4096, vocab_size=tokenizer.vocab_size)
    return build_frontend(card, ScriptedCoordinator(tokens_script(token_ids))), token_ids


@contextmanager
def answering(card: ModelCard, tokenizer: HuggingFaceTokenizer, text: str, **script: Any) -> Iterator[str]:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(text)[1:], **script))
    with http_server(build_frontend(replace(card, max_model_len=4096), coordinator)) as url:
        yield url


def whole(url: str, **fields: Any) -> Any:
    answer = httpx.post(f"{url}/v1/chat/completions", json=ASKED | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def named(choice: Any) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", ())
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_arguments_are_streamed_as_they_are_written(calls: tuple[Frontend, list[int]]) -> None:
    """A call of a thousand tokens was silent until its last one."""
    with http_server(calls[0]) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        chunks = list(client.chat.completions.create(**ASKED, stream=True))
        with client.chat.completions.stream(**ASKED) as stream:
            message = stream.get_final_completion().choices[0].message
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *more = [piece for piece in pieces if piece.index == 0]
    assert (first.type, first.function.name) == ("function", "weather")
    assert ID.fullmatch(first.id)
    assert len(more) > 5
    assert all((piece.id, piece.type, piece.function.name) == (None, None, None) for piece in more)
    assert "".join(piece.function.arguments for piece in [first, *more]) == ARGUMENTS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assembled = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert assembled == [("weather", ARGUMENTS), ("time", "{}")]


@pytest.mark.parametrize("chunk", [3, 1000])
def test_tokens_that_come_together_are_one_piece_of_each_call(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, chunk: int
) -> None:
    with answering(card, tokenizer, TWO_CALLS, chunk=chunk) as url:
        lines = httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"stream": True}).text.split("\n\n")
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    found = [delta.get("tool_calls", []) for delta in deltas]
    assert all(len({call["index"] for call in pieces}) == len(pieces) for pieces in found)
    pieces = [
        ToolCall(c["index"], c.get("id", ""), c["function"].get("name", ""), c["function"]["arguments"])
        for each in found
        for c in each
    ]
    assert [(call.name, call.arguments) for call in joined(pieces)] == [("weather", ARGUMENTS), ("time", "{}")]


def test_a_call_that_is_cut_comes_as_far_as_it_was_written(calls: tuple[Frontend, list[int]]) -> None:
    """It was lost, tokens and all."""
    frontend, token_ids = calls
    with http_server(frontend) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for max_tokens in (2, len(token_ids) // 2, len(token_ids) - 1):
            choice = whole(url, max_tokens=max_tokens)
            assert choice["finish_reason"] == "length"
            with client.chat.completions.stream(**ASKED, max_tokens=max_tokens) as stream:
                for _ in stream:
                    pass
                message = stream.current_completion_snapshot.choices[0].message
            streamed = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
            assert (message.content or "", streamed) == (choice["message"]["content"], named(choice))
    assert streamed[0] == ("weather", ARGUMENTS)


def test_wherever_it_is_cut_no_name_is_cut_and_nothing_else_is_lost(calls: tuple[Frontend, list[int]]) -> None:
    """And a marker came as the text `[T`."""
    frontend, token_ids = calls
    [model] = map(frontend.served, frontend.cards)
    body = parse_body(ChatCompletionRequest, ASKED, 0)
    [request] = (generation := model.validator.chat(body)).requests
    halves = set()
    for end in range(1, len(token_ids) + 1):
        choice = Choice(0, request, generation, model.tokenizer, Usage(0))
        delta = choice.push(TokenChunk("r", 0, 0, tuple(token_ids[:end]), finish_reason="length"))
        said = detokenize(model.tokenizer, token_ids[:end])
        assert delta.finish_reason == "length"
        assert "[T" not in delta.text
        assert said.endswith(delta.text)
        assert len(delta.tool_calls) <= 2
        for call, name, arguments in zip(delta.tool_calls, ("weather", "time"), (ARGUMENTS, "{}"), strict=False):
            assert call.name == name
            head = f'"{name}", "arguments": ' if '{"name"' in said else name
            assert call.arguments == said.partition(head)[2][: len(arguments)]
        halves.add(delta.text)
    assert halves & {"wea", "w", '{"name": "wea', '{"name": "w'}, "half a name is text"
    assert [call.arguments for call in delta.tool_calls] == [ARGUMENTS, "{}"]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_client_of_mistral_s_gets_each_call_whole(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, chunk: int
) -> None:
    """langchain-mistralai gives each piece of the first call an id of its own, and then cannot add them up."""
    deltas = []
    with answering(card, tokenizer, TWO_CALLS, chunk=chunk) as url:
        asked = ASKED | {"stream": True, "n": 2}
        headers = {"accept": "text/event-stream"}
        lines = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers).text.split("\n\n")
        deltas = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
        cut = asked | {"max_tokens": len(tokenizer.encode(TWO_CALLS)) - 4}
        lines = httpx.post(f"{url}/v1/chat/completions", json=cut, headers=headers).text.split("\n\n")
        last = json.loads(lines[-3].removeprefix("data: "))["choices"][0]
    for index in (0, 1):
        calls = [call for delta in deltas if delta["index"] == index for call in delta["delta"].get("tool_calls", ())]
        named = [(call["index"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        assert named == [(0, "weather", ARGUMENTS), (1, "time", "{}")]
        assert all(ID.fullmatch(call["id"]) for call in calls)
    assert last["finish_reason"] == "length"
    assert [call["function"]["name"] for call in last["delta"]["tool_calls"]][-1] == "time"


@pytest.mark.parametrize(
    ("choice", "cut", "content"),
    [("auto", "[", "["), ("auto", "[T", ""), ("auto", "\n ", "\n "), ("required", "[", "")],
)
def test_a_marker_that_is_cut_is_no_text(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, choice: str, cut: str, content: str
) -> None:
    with answering(card, tokenizer, cut, eos=None) as url:
        answer = whole(url, tool_choice=choice)
    assert (answer["message"]["content"], answer["finish_reason"]) == (content, "length")


@pytest.mark.parametrize("stop", ['": "', "city", "[", "{", "weather", "TOOL"])
def test_a_stop_string_ends_text_and_no_call(calls: tuple[Frontend, list[int]], stop: str) -> None:
    """`stop: "\\n"` or `"}"`, as agents send them, lost a call that had to be made: no text, no calls, `stop`."""
    with http_server(calls[0]) as url:
        choice = whole(url, stop=[stop], tool_choice="required")
    assert named(choice) == [("weather", ARGUMENTS), ("time", "{}")]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "tool_calls")


def test_a_stop_string_in_the_text_before_calls_ends_the_answer(tmp_path: Path) -> None:
    directory = write_tokenizer(tmp_path, chat_template=SPELLING_TEMPLATE, special=["[TOOL_CALLS]", "[ARGS]"])
    tokenizer = HuggingFaceTokenizer(directory)
    card = model_card(directory, vocab_size=tokenizer.vocab_size)
    with answering(card, tokenizer, "I look. Well" + SPELLED_CALLS, chunk=1000) as url:
        choice = whole(url, stop=[" Well"])
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "stop")
    assert named(choice) == []


def test_a_stop_token_in_a_call_leaves_the_beginning_of_it(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """It is no finished call: `tool_calls` would have it parsed."""
    with answering(card, tokenizer, TWO_CALLS[:-40]) as url:
        choice = whole(url)
    assert named(choice) == [("weather", ARGUMENTS[:-3])]
    assert choice["finish_reason"] == "stop"


def test_arguments_are_streamed_over_grpc(calls: tuple[Frontend, list[int]]) -> None:
    request = chat_pb2.ChatRequest(
        model="tiny",
        messages=[chat_pb2.Message(role="user", content="Hello")],
        tools=[
            chat_pb2.Tool(name="weather", parameters=json.dumps(WEATHER["function"]["parameters"])),
            chat_pb2.Tool(name="time"),
        ],
    )
    with grpc_server(calls[0]) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        pieces = [call for chunk in stub.ChatStream(request) for call in chunk.choice.tool_calls]
        [choice] = stub.Chat(request).choices
        request.sampling.max_tokens = len(calls[1]) - 8
        [cut] = stub.Chat(request).choices
    assert [bool(piece.id) for piece in pieces] == [bool(piece.name) for piece in pieces]
    assert sum(bool(piece.id) for piece in pieces) == 2
    assert len(pieces) > 6
    streamed = joined(ToolCall(piece.index, piece.id, piece.name, piece.arguments) for piece in pieces)
    for found in (streamed, choice.tool_calls):
        assert [(call.index, call.name, call.arguments) for call in found] == [
            (0, "weather", ARGUMENTS),
            (1, "time", "{}"),
        ]
    assert choice.finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert cut.finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert cut.tool_calls[0].name == "weather"
    assert ARGUMENTS.startswith(cut.tool_calls[0].arguments)
