"""Anthropic's Messages API, driven by anthropic's own client, whose types every answer and event has to pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from cluster.errors import Unavailable
from cluster.messages import JsonSchema, ModelCard, ToolCallGrammar
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, http_server, tokens_script

ANSWER = "Grüße 👩‍🚀, 你好"
HELLO: Any = [{"role": "user", "content": "Hello"}]
ASKED: Any = {"model": "tiny", "max_tokens": 200, "messages": HELLO}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture
def client(door: tuple[str, ScriptedCoordinator]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=door[0], api_key="none", max_retries=0) as client:
        yield client


def said(door: tuple[str, ScriptedCoordinator], **fields: Any) -> httpx.Response:
    return httpx.post(f"{door[0]}/v1/messages", json=ASKED | fields)


def events_of(answer: httpx.Response) -> list[Any]:
    """Each is of the type that its line says, and passes Anthropic's own schema of it."""
    found = []
    for text in answer.text.split("\n\n")[:-1]:
        name, data = text.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        found.append(EVENT.validate_python(document))
    return found


def prompt(door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer) -> str:
    return tokenizer.decode(door[1].requests[-1].prompt_token_ids)


def test_whole_and_streamed_are_equal(client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator]) -> None:
    whole = client.messages.create(**ASKED)
    Message.model_validate(whole.model_dump(), strict=True)
    assert [(block.type, getattr(block, "text", None)) for block in whole.content] == [("text", ANSWER)]
    assert (whole.stop_reason, whole.stop_sequence, whole.role) == ("end_turn", None, "assistant")
    assert whole.usage.output_tokens > 5
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == ANSWER
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["text"]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in events_of(said(door, stream=True))]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_system_is_said_before_and_an_assistants_last_turn_is_continued(
    client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    system: Any = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "No lists."},
    ]
    turns: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Well"},
    ]
    answer = client.messages.create(model="tiny", max_tokens=200, system=system, messages=turns)
    assert prompt(door, tokenizer) == "<s>Be brief.\n\nNo lists.[INST] Hello [/INST]Well"
    [block] = answer.content
    assert block.type == "text"
    assert not block.text.startswith("Well"), "only what is new is said"


def test_turns_of_one_role_are_one(
    client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """Templates refuse two turns of the user in a row; Anthropic joins them."""
    client.messages.create(model="tiny", max_tokens=3, messages=[*HELLO, {"role": "user", "content": "again"}])
    assert prompt(door, tokenizer) == "<s>[INST] Hello\nagain [/INST]"


def test_why_it_ended_is_said(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(model="tiny", max_tokens=3, messages=HELLO)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    stopped = client.messages.create(**ASKED, stop_sequences=["xyz", " 👩"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " 👩")
    assert stopped.content[0].text == "Grüße"  # type: ignore[union-attr]
    with client.messages.stream(**ASKED, stop_sequences=[" 👩"]) as stream:
        assert stream.get_final_message().stop_sequence == " 👩"


def test_sampling_reaches_the_engine(client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator]) -> None:
    client.messages.create(**ASKED, extra_body={"temperature": 0.5, "top_p": 0.25, "top_k": 7})
    sampling = door[1].requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.25, 7, 200)


def test_an_answer_is_held_to_a_schema(client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    client.messages.create(**ASKED, extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    grammar = door[1].requests[-1].grammar
    assert isinstance(grammar, JsonSchema)
    assert json.loads(grammar.text)["required"] == ["a"]


def test_tokens_are_counted_as_they_would_be_asked(
    calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str],
) -> None:
    client, coordinator, _ = calling
    num_asked = len(coordinator.requests)
    asked: Any = {"model": "tiny", "system": "Be brief.", "messages": HELLO, "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked).input_tokens
    assert len(coordinator.requests) == num_asked, "no model is asked"
    assert client.messages.create(**asked, max_tokens=1).usage.input_tokens == counted
    assert client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens < counted
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers: not supported"):
        client.messages.count_tokens(**asked, extra_body={"mcp_servers": [{"url": "https://x"}]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: expected user or assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: expected a string or a list of blocks"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type: expected text or tool_result",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text: expected a string",
        ),
        ({"system": [{"type": "text", "text": 1}]}, "system[0].text: expected a string"),
        ({"temperature": 9}, "temperature: "),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type: only 'custom' is supported",
        ),
        ({"tools": [{"name": "f", "input_schema": 3}]}, "tools[0].input_schema: "),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools[0].name: "),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: expected"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type: expected"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: expected 'json_schema'"),
        ({"mcp_servers": [{"url": "https://x"}]}, "mcp_servers: not supported by this server"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: at most 16 entries, got 17"),
    ],
)
def test_a_wrong_field_is_named_as_this_api_has_it(
    door: tuple[str, ScriptedCoordinator], fields: Any, message: str
) -> None:
    answer = said(door, **fields)
    document = answer.json()
    assert (answer.status_code, document["type"]) == (400, "error")
    assert document["error"]["type"] == "invalid_request_error"
    assert document["error"]["message"].startswith(message)
    assert document["request_id"] == answer.headers["request-id"]


def test_errors_are_those_that_the_client_knows(
    client: anthropic.Anthropic, door: tuple[str, ScriptedCoordinator]
) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="nobody", max_tokens=1, messages=HELLO)
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    wrong_method = httpx.get(f"{door[0]}/v1/messages")
    assert (wrong_method.status_code, wrong_method.json()["type"]) == (405, "error")
    assert wrong_method.headers["request-id"] == wrong_method.json()["request_id"]
    no_json = httpx.post(f"{door[0]}/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert (no_json.status_code, no_json.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_error_before_the_first_token_has_its_status_and_one_after_it_is_an_event(
    tokenizer: HuggingFaceTokenizer, card: ModelCard
) -> None:
    for text, ends in (("", False), ("Hello", True)):
        coordinator = ScriptedCoordinator(failing_script(tokenizer.encode(text)[1:], Unavailable("an expert is gone")))
        with (
            http_server(build_frontend(card, coordinator)) as url,
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
        ):
            with pytest.raises(anthropic.APIStatusError, match="an expert is gone"):
                list(client.messages.create(**ASKED, stream=True))
            answer = httpx.post(f"{url}/v1/messages", json=ASKED | {"stream": True})
            assert answer.status_code == (200 if ends else 503)
            if ends:
                last = json.loads(answer.text.split("\n\n")[-2].partition("data: ")[2])
                assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


WEATHER: Any = {
    "name": "weather",
    "description": "Today's weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Pâris"}}, {"name": "weather", "arguments": {}}]'


@pytest.fixture
def calling(
    tokenizer: HuggingFaceTokenizer, card: ModelCard
) -> Iterator[tuple[anthropic.Anthropic, ScriptedCoordinator, str]]:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(CALLS)[1:]))
    with (
        http_server(build_frontend(replace(card, max_model_len=4096), coordinator)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client, coordinator, url


def test_calls_whole_and_streamed_are_equal(calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str]) -> None:
    client, _, url = calling
    asked: Any = ASKED | {"tools": [WEATHER]}
    whole = client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("weather", {"city": "Pâris"}), ("weather", {})]
    assert len({call.id for call in calls}) == len(whole.content) == 2
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    again = [(block.name, block.input) for block in streamed.content if block.type == "tool_use"]
    assert again == [(call.name, call.input) for call in calls]
    events = events_of(httpx.post(f"{url}/v1/messages", json=asked | {"stream": True}))
    pieces = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
    assert "".join(pieces) == '{"city": "Pâris"}{}'
    assert len(pieces) > 6, "as they are written"
    opened = [event.index for event in events if event.type == "content_block_start"]
    assert opened == [event.index for event in events if event.type == "content_block_stop"] == [0, 1]


@pytest.mark.parametrize(
    ("choice", "required", "names", "parallel"),
    [
        ({"type": "any"}, True, ["weather", "news"], True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, ["weather", "news"], False),
        ({"type": "tool", "name": "news"}, True, ["news"], False),
        ({"type": "auto"}, False, ["weather", "news"], True),
    ],
)
def test_which_tools_may_be_called(
    calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str],
    choice: Any,
    required: bool,
    names: Any,
    parallel: bool,
) -> None:
    client, coordinator, _ = calling
    client.messages.create(**ASKED, tools=[WEATHER, WEATHER | {"name": "news"}], tool_choice=choice)
    grammar = coordinator.requests[-1].grammar
    assert isinstance(grammar, ToolCallGrammar)
    assert (grammar.required, [name for name, _ in grammar.tools]) == (required, names)
    assert grammar.parallel == parallel


def test_none_may_be_called(calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str]) -> None:
    client, coordinator, _ = calling
    client.messages.create(**ASKED, tools=[WEATHER], tool_choice={"type": "none"})
    grammar = coordinator.requests[-1].grammar
    assert grammar is None or (isinstance(grammar, ToolCallGrammar) and not grammar.tools)


def test_calls_and_their_results_are_the_next_turns_input(
    calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str], tokenizer: HuggingFaceTokenizer
) -> None:
    client, coordinator, _ = calling
    first = client.messages.create(**ASKED, tools=[WEATHER])
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": content, "is_error": not i}
        for i, (block, content) in enumerate(
            zip(first.content, ("no such city", [{"type": "text", "text": "rain"}]), strict=True)
        )
        if block.type == "tool_use"
    ]
    turns: Any = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]},
    ]
    client.messages.create(model="tiny", max_tokens=10, messages=turns, tools=[WEATHER])
    asked = tokenizer.decode(coordinator.requests[-1].prompt_token_ids)
    assert asked.count('{"name": "weather", "arguments": {') == 2
    assert '[TOOL_RESULTS] {"content": "Error: no such city"' in asked
    assert '[TOOL_RESULTS] {"content": "rain"' in asked
    assert "And now?" in asked


def test_a_call_that_is_cut_has_an_empty_input(
    calling: tuple[anthropic.Anthropic, ScriptedCoordinator, str], tokenizer: HuggingFaceTokenizer
) -> None:
    """What was written of it is no JSON."""
    client, _, _ = calling
    max_tokens = len(tokenizer.encode(CALLS[: CALLS.index("P")])) - 1
    whole = client.messages.create(model="tiny", max_tokens=max_tokens, messages=HELLO, tools=[WEATHER])
    assert whole.stop_reason == "max_tokens"
    [block] = whole.content
    assert (block.type, block.input) == ("tool_use", {})  # type: ignore[union-attr]


def test_models_are_listed_page_by_page(tokenizer: HuggingFaceTokenizer, card: ModelCard) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("x")[1:]))
    many = replace(card, aliases=tuple(f"alias-{i}" for i in range(4)))
    with (
        http_server(build_frontend(many, coordinator)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        names = [card.name, *many.aliases]
        assert [model.id for model in client.models.list(limit=2)] == names, "the client turns the pages"
        first = client.models.list(limit=2)
        assert (first.has_more, first.first_id, first.last_id) == (True, names[0], names[1])
        before = client.models.list(limit=2, before_id=names[3])
        assert [model.id for model in before.data] == names[1:3]
        assert before.has_more
        assert client.models.retrieve("alias-1").created_at.timestamp() == card.created
        for query, message in (
            ({"limit": 0}, "limit: expected 1 to 1000"),
            ({"after_id": "nobody"}, "after_id: no model of that name is in the list"),
        ):
            with pytest.raises(anthropic.BadRequestError, match=message):
                client.models.list(**query)
