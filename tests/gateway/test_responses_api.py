"""The Responses API, driven by openai's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import Unavailable
from cluster.messages import JsonSchema, ModelCard, ToolCallGrammar
from gateway.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    failing_script,
    http_server,
    tokens_script,
)

ANSWER = "Grüße 👩‍🚀, 你好"


def test_whole_and_streamed_are_equal(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="Hello", instructions="Be brief.", temperature=0)
    assert whole.output_text == ANSWER
    assert (whole.status, whole.instructions, whole.temperature) == ("completed", "Be brief.", 0)
    assert whole.usage is not None
    assert whole.usage.output_tokens > 5
    events = list(client.responses.create(model="tiny", input="Hello", instructions="Be brief.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER
    assert last.response.usage == whole.usage


def test_the_clients_own_accumulator_understands_the_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="Hello") as stream:
        assert stream.get_final_response().output_text == ANSWER


def test_every_shape_of_input_is_the_same_conversation(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]
) -> None:
    shapes: list[Any] = [
        "Hello",
        [{"role": "user", "content": "Hello"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
    ]
    door[1].requests.clear()
    for shape in shapes:
        client.responses.create(model="tiny", input=shape, max_output_tokens=3)
    assert len({request.prompt_token_ids for request in door[1].requests}) == 1


def test_a_schema_reaches_the_coordinator(client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    answer = client.responses.create(model="tiny", input="Hello", text=wanted)
    grammar = door[1].requests[-1].grammar
    assert isinstance(grammar, JsonSchema)
    assert json.loads(grammar.text)["required"] == ["n"]
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"


def test_at_max_output_tokens_it_is_incomplete(client: openai.OpenAI) -> None:
    cut = client.responses.create(model="tiny", input="Hello", max_output_tokens=3)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"


def test_its_answer_is_the_next_turns_input(client: openai.OpenAI, door: tuple[str, ScriptedCoordinator]) -> None:
    first = client.responses.create(model="tiny", input="Hello")
    turns: Any = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And?"}]
    assert client.responses.create(model="tiny", input=turns).output_text == ANSWER


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]}, "input"),
        ({"input": "x" * 9000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 999}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        (
            {"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {"not": {}}}]},
            "tools[0].parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": "json"}, "text"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
    ],
)
def test_what_is_wrong_or_not_served_is_named(
    door: tuple[str, ScriptedCoordinator], change: dict[str, Any], param: str
) -> None:
    answer = httpx.post(door[0] + "/v1/responses", json={"model": "tiny", "input": "Hello"} | change)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


def test_an_error_mid_stream_is_its_last_event(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(failing_script(tokenizer.encode("Hello")[1:], Unavailable("an expert is gone")))
    with (
        http_server(build_frontend(card, coordinator)) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError, match="an expert is gone"):
            list(client.responses.create(model="tiny", input="Hello", stream=True))
        with pytest.raises(openai.InternalServerError, match="an expert is gone"):
            client.responses.create(model="tiny", input="Hello")


WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Today's weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALLS = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Pâris"}}, {"name": "weather", "arguments": {}}]'


@pytest.fixture
def calling(tokenizer: HuggingFaceTokenizer, card: ModelCard) -> Iterator[tuple[openai.OpenAI, ScriptedCoordinator]]:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(CALLS)[1:]))
    with (
        http_server(build_frontend(replace(card, max_model_len=4096), coordinator)) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, coordinator


def test_calls_whole_and_streamed_are_equal(calling: tuple[openai.OpenAI, ScriptedCoordinator]) -> None:
    client, coordinator = calling
    choice: Any = {"type": "function", "name": "weather"}
    whole = client.responses.create(model="tiny", input="Hello", tools=[WEATHER], tool_choice=choice)
    grammar = coordinator.requests[-1].grammar
    assert isinstance(grammar, ToolCallGrammar)
    assert grammar.required
    assert (whole.status, whole.output_text, whole.tools[0].type) == ("completed", "", "function")
    with client.responses.stream(model="tiny", input="Hello", tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    each = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert kinds == ["response.created", "response.in_progress", *each, *each, "response.completed"]
    for answer in (whole, streamed):
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Pâris"}'), ("weather", "{}")]
        assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == len(answer.output) == 2


def test_calls_and_their_results_are_the_next_turns_input(
    calling: tuple[openai.OpenAI, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    client, coordinator = calling
    user: Any = {"role": "user", "content": "Hello"}
    first = client.responses.create(model="tiny", input=[user], tools=[WEATHER])
    results: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
        for item in first.output
        if item.type == "function_call"
    ]
    turns: Any = [user, *first.output, *results]
    client.responses.create(model="tiny", input=turns, tools=[WEATHER])
    prompt = tokenizer.decode(coordinator.requests[-1].prompt_token_ids)
    assert prompt.count('{"name": "weather", "arguments": {') == 2
    assert prompt.count('[TOOL_RESULTS] {"content": "rain"') == 2
    assert prompt.count("[TOOL_CALLS] [{") == 2, "in the turn before, and in the sentence that says how"


def test_text_beside_tools_is_a_message(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(ANSWER)[1:]))
    with (
        http_server(build_frontend(replace(card, max_model_len=4096), coordinator)) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
        client.responses.stream(model="tiny", input="Hello", tools=[WEATHER]) as stream,
    ):
        answer = stream.get_final_response()
    assert answer.output_text == ANSWER
    assert [item.type for item in answer.output] == ["message"]
