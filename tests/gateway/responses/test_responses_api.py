"""The Responses API, driven by openai's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.errors import Unavailable
from cluster.messages import JsonSchema, ModelCard, ToolCallGrammar
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.chat_formats import write_gpt_oss
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    failing_script,
    http_server,
    model_card,
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


def test_log_probabilities_are_those_of_the_texts_tokens(client: openai.OpenAI) -> None:
    for asked in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        num_top = asked.get("top_logprobs", 0)
        request: Any = {"model": "tiny", "input": "Hello", **asked}
        whole = client.responses.create(**request)
        assert whole.usage is not None
        [message] = whole.output
        assert message.type == "message"
        [part] = message.content
        assert part.type == "output_text"
        assert part.logprobs is not None
        assert len(part.logprobs) == whole.usage.output_tokens, "one a token, with the one that ended the answer"
        assert {len(at.top_logprobs) for at in part.logprobs} == {num_top}
        spelled = b"".join(bytes(at.bytes) for at in part.logprobs[:-1])
        assert spelled.decode() == ANSWER
        events = list(client.responses.create(**request, stream=True))
        told = [at for event in events if event.type == "response.output_text.delta" for at in event.logprobs]
        assert [at.token for at in told] == [at.token for at in part.logprobs[:-1]]
        [done] = [event for event in events if event.type == "response.output_text.done"]
        assert len(done.logprobs) == len(part.logprobs)


def test_log_probabilities_that_would_fill_a_gateway_are_refused(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other routes bounded them; here a long answer's were held without a bound, streamed as well."""
    asked: Any = {"model": "tiny", "input": "Hello", "top_logprobs": 4}
    whole = client.responses.create(**asked)
    assert whole.usage is not None
    monkeypatch.setattr("gateway.answer.held_scores.MAX_SCORES", 5 * whole.usage.output_tokens)
    assert client.responses.create(**asked).output_text == ANSWER
    more = asked | {"top_logprobs": 5}
    with pytest.raises(openai.BadRequestError, match="top_logprobs: at most") as refused:
        client.responses.create(**more)
    assert refused.value.param == "top_logprobs"
    assert door[1].running == 0
    with pytest.raises(openai.APIError, match="top_logprobs: at most"):
        list(client.responses.create(**more, stream=True))


def test_what_is_only_said_back_is_said_back(client: openai.OpenAI) -> None:
    """An effort was answered with null, whatever had been asked."""
    answer = client.responses.create(
        model="tiny",
        input="Hello",
        reasoning={"effort": "high", "summary": "auto"},
        include=["reasoning.encrypted_content", "web_search_call.results"],
        text={"verbosity": "low"},
        truncation="auto",
        max_tool_calls=3,
    )
    assert answer.reasoning is not None
    assert (answer.reasoning.effort, answer.reasoning.summary) == ("high", "auto")
    assert answer.text is not None
    assert (answer.text.verbosity, answer.truncation, answer.max_tool_calls) == ("low", "auto", 3)
    unasked = client.responses.create(model="tiny", input="Hello")
    assert unasked.reasoning is not None
    assert (unasked.reasoning.effort, unasked.truncation) == (None, "disabled")


def test_instructions_beside_a_developers_message_are_one(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """Two messages of the system: the model's template refuses the second, as most do."""
    turns: Any = [
        {"role": "developer", "content": "Speak French."},
        {"role": "system", "content": [{"type": "input_text", "text": "No lists."}]},
        {"role": "user", "content": "Hello"},
    ]
    client.responses.create(model="tiny", input=turns, instructions="Be brief.", max_output_tokens=3)
    prompt = tokenizer.decode(door[1].requests[-1].prompt_token_ids)
    assert prompt == "<s>Be brief.\n\nSpeak French.\n\nNo lists.[INST] Hello [/INST]"


def test_refusals_and_reasoning_in_the_history(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """A refusal is what the assistant said; what a model thought is read by no model here, and changes nothing."""
    turns: Any = [
        {"role": "user", "content": "Hello"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "refusal", "refusal": "I cannot."}],
        },
        {"role": "user", "content": "Why?"},
    ]
    client.responses.create(model="tiny", input=turns, max_output_tokens=3)
    prompt = tokenizer.decode(door[1].requests[-1].prompt_token_ids)
    assert prompt == "<s>[INST] Hello [/INST]I cannot.</s>[INST] Why? [/INST]"


def test_truncation_drops_the_oldest_turns_and_no_others(
    client: openai.OpenAI, door: tuple[str, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """The context has 256 tokens. `disabled` refuses what is longer; `auto` keeps the newest turns that fit."""

    def turns(number: int) -> Any:
        said = [
            [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}] for i in range(number)
        ]
        return [item for pair in said for item in pair] + [{"role": "user", "content": "Last"}]

    def prompt(**fields: Any) -> str:
        client.responses.create(model="tiny", instructions="Be brief.", truncation="auto", **fields)
        return tokenizer.decode(door[1].requests[-1].prompt_token_ids)

    assert "Q0" in prompt(input=turns(3)), "what fits is whole"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="tiny", input=turns(80), instructions="Be brief.")
    for max_output_tokens in (None, 100):
        kept = prompt(input=turns(80), max_output_tokens=max_output_tokens)
        first = kept.index("[INST] Q")
        assert kept[:first] == "<s>Be brief.", "what instructs the model stays"
        number = int(kept[first + 8 :].split(" ")[0])
        assert (
            kept[first:] == "".join(f"[INST] Q{i} [/INST]A{i}</s>" for i in range(number, 80)) + "[INST] Last [/INST]"
        )
        longer = f"[INST] Q{number - 1} [/INST]A{number - 1}</s>"
        size = len(tokenizer.encode(kept, add_special_tokens=False))
        room = 256 - (max_output_tokens or 1)
        assert size <= room < size + len(tokenizer.encode(longer, add_special_tokens=False)), (
            "and no turn too many goes"
        )
    long_one = [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "A"}, *turns(1)]
    assert "x x" not in prompt(input=long_one)


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
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": [{"id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[0].output"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
            "input[0].output[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "refusal", "text": "x"}]}]}, "input[0].content[0].refusal"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        # It was `input[1].tool_calls[0].function`: turns were counted, the instructions among them.
        (
            {"instructions": "x", "input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": "{}"}]},
            "input[0].name",
        ),
        (
            {
                "instructions": "x",
                "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "\\ud800"}'}],
            },
            "input[0].arguments",
        ),
        (
            {"instructions": "x", "input": [{"type": "function_call_output", "call_id": "", "output": "x"}]},
            "input[0].call_id",
        ),
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
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
            "tool_choice",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "allowed_callers": ["programmatic"]}]},
            "tools[0].allowed_callers",
        ),
        ({"truncation": "oldest"}, "truncation"),
        ({"truncation": "auto", "input": "x" * 9000}, "input"),
        ({"truncation": "auto", "max_output_tokens": 999}, "max_output_tokens"),
        ({"reasoning": {"effort": "a lot"}}, "reasoning.effort"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": "json"}, "text"),
        ({"include": ["reasoning.encrypted_content", "everything"]}, "include[1]"),
        ({"include": "reasoning.encrypted_content"}, "include"),
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
        events = list(stream)
        streamed = stream.get_final_response()
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(event.delta for event in deltas) == '{"city": "Pâris"}{}'
    assert len(deltas) > 6, "as they are written"
    assert len({event.item_id for event in deltas}) == 2
    each = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    once = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    assert once == ["response.created", "response.in_progress", *each, *each, "response.completed"]
    for answer in (whole, streamed):
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [("weather", '{"city": "Pâris"}'), ("weather", "{}")]
        assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == len(answer.output) == 2


@pytest.mark.parametrize("cut", [True, False])
def test_a_call_that_is_cut_is_an_incomplete_item(
    calling: tuple[openai.OpenAI, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer, cut: bool
) -> None:
    """It was lost; now it is an item, or a message where not even its name is whole."""
    client, _ = calling
    upto = CALLS.index("P" if cut else "eather")
    max_tokens = len(tokenizer.encode(CALLS[:upto])) - 1
    asked: Any = {"model": "tiny", "input": "Hello", "tools": [WEATHER], "max_output_tokens": max_tokens}
    whole = client.responses.create(**asked)
    *_, last = client.responses.create(**asked, stream=True)
    assert (whole.status, last.type) == ("incomplete", "response.incomplete")
    for answer in (whole, last.response):
        [item] = answer.output
        assert item.status == "incomplete"
        if cut:
            assert (item.type, item.name, item.arguments) == ("function_call", "weather", '{"city": "')
        else:
            assert answer.output_text == '{"name": "w'


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


def test_a_tools_output_may_be_a_list_of_parts(
    calling: tuple[openai.OpenAI, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """Agents whose tools are an MCP server's send it so: their second turn was a 400."""
    client, coordinator = calling
    turns: Any = [
        {"role": "user", "content": "Hello"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "rain"}, {"type": "input_text", "text": "wind"}],
        },
    ]
    client.responses.create(model="tiny", input=turns, tools=[WEATHER])
    assert '{"content": "rain\\nwind"' in tokenizer.decode(coordinator.requests[-1].prompt_token_ids)


def test_of_the_allowed_tools_only_may_be_called(
    calling: tuple[openai.OpenAI, ScriptedCoordinator], tokenizer: HuggingFaceTokenizer
) -> None:
    """The model is told of all tools, so that its prompt stays the same, and may call those."""
    client, coordinator = calling
    news: Any = WEATHER | {"name": "news"}
    allowed = [{"type": "function", "name": "news"}]
    for mode in ("auto", "required"):
        choice: Any = {"type": "allowed_tools", "mode": mode, "tools": allowed}
        answer = client.responses.create(model="tiny", input="Hello", tools=[WEATHER, news], tool_choice=choice)
        assert answer.tool_choice.type == "allowed_tools"  # type: ignore[union-attr]
        request = coordinator.requests[-1]
        assert isinstance(request.grammar, ToolCallGrammar)
        assert [name for name, _ in request.grammar.tools] == ["news"]
        assert (request.grammar.required, request.grammar.parallel) == (mode == "required", True)
        assert '"name": "weather"' in tokenizer.decode(request.prompt_token_ids)


def test_log_probabilities_beside_calls_are_no_texts(
    calling: tuple[openai.OpenAI, ScriptedCoordinator],
) -> None:
    client, _ = calling
    answer = client.responses.create(model="tiny", input="Hello", tools=[WEATHER], top_logprobs=1)
    assert [item.type for item in answer.output] == ["function_call", "function_call"]


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


def test_what_is_thought_after_a_text_or_a_call_is_an_item_of_its_own(tmp_path: Path) -> None:
    """gpt-oss may think again: the text or the call before it was lost, and so was the answer after a text."""
    tokenizer = HuggingFaceTokenizer(write_gpt_oss(tmp_path))
    again = "<|start|>assistant<|channel|>"
    written = (
        f"<|channel|>commentary<|message|>I look.<|end|>{again}analysis<|message|>Where?<|end|>"
        f"{again}commentary to=functions.weather <|constrain|>json<|message|>{{}}<|call|>"
        f"{again}analysis<|message|>Rain.<|end|>{again}final<|message|>It rains."
    )
    script = tokens_script(tokenizer.encode(written, add_special_tokens=False))
    card = model_card(tmp_path, vocab_size=400, max_model_len=4096)
    with (
        http_server(build_frontend(card, ScriptedCoordinator(script))) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": "tiny", "input": "Hello", "tools": [WEATHER]}
        whole = client.responses.create(**asked).output
        events = list(client.responses.create(**asked, stream=True))
    kinds = [item.type for item in whole]
    assert kinds == ["message", "reasoning", "function_call", "reasoning", "message"]
    said = [item.content[0].text.strip() for item in whole if item.type == "message"]  # type: ignore[union-attr]
    assert said == ["I look.", "It rains."]
    open_at: list[int] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert not open_at, "one item at a time"
            open_at.append(event.output_index)
        elif event.type == "response.output_item.done":
            assert open_at.pop() == event.output_index
    assert events[-1].type == "response.completed"
    assert [item.type for item in events[-1].response.output] == kinds
