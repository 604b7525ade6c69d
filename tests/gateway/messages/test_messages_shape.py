"""Blocks of an answer that thinks, speaks and calls, whatever pieces it comes in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from gateway.answer.calls import ToolCall
from gateway.answer.choice import Delta, Usage
from gateway.messages.input import chat_messages
from gateway.messages.shape import MessagesShape

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def delta(**fields: Any) -> Delta:
    fields = {"index": 0, "text": "", "token_ids": (1,), "logprobs": None, "finish_reason": None} | fields
    return Delta(**fields)


def test_thought_text_and_calls_are_blocks_in_their_order() -> None:
    generation: Any = SimpleNamespace(id="chatcmpl-1f", card=SimpleNamespace(name="tiny"))
    shape, usage = MessagesShape(generation), Usage(9, completion_tokens=7, cached_tokens=4)
    deltas = [
        delta(reasoning="Let me "),
        delta(reasoning="see.", text="It"),
        delta(text=" is", tool_calls=(ToolCall(0, "call00001", "f", '{"a"'),)),
        delta(tool_calls=(ToolCall(0, "", "", ": 1}"), ToolCall(1, "call00002", "g", "{}"))),
        delta(finish_reason="tool_calls"),
    ]
    events = [*shape.begin(usage), *(event for one in deltas for event in shape.push(one)), *shape.end(usage)]
    for event in events:
        EVENT.validate_python(event)
    blocks = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert blocks == ["thinking", "text", "tool_use", "tool_use"]
    open_blocks: list[int] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert not open_blocks
            open_blocks.append(event["index"])
        elif event["type"] == "content_block_stop":
            assert open_blocks.pop() == event["index"]
        elif event["type"] == "content_block_delta":
            assert open_blocks == [event["index"]]
    whole = shape.whole(usage)
    Message.model_validate(whole, strict=True)
    assert whole["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "It is"},
        {"type": "tool_use", "id": "call00001", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call00002", "name": "g", "input": {}},
    ]
    assert whole["stop_reason"] == "tool_use"
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 9


def test_what_is_thought_after_a_call_is_no_part_of_its_input() -> None:
    """gpt-oss may think again after a call: both came in one delta, and its input became thought."""
    generation: Any = SimpleNamespace(id="chatcmpl-1f", card=SimpleNamespace(name="tiny"))
    shape, usage = MessagesShape(generation), Usage(9)
    deltas = [
        delta(tool_calls=(ToolCall(0, "call00001", "f", '{"a"'),)),
        delta(tool_calls=(ToolCall(0, "", "", ": 1}"),), reasoning="And now?"),
        delta(finish_reason="tool_calls"),
    ]
    for event in (*(event for one in deltas for event in shape.push(one)), *shape.end(usage)):
        EVENT.validate_python(event)
    assert shape.whole(usage)["content"] == [
        {"type": "tool_use", "id": "call00001", "name": "f", "input": {"a": 1}},
        {"type": "thinking", "thinking": "And now?", "signature": ""},
    ]


def test_what_was_thought_goes_back_to_the_template() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "It is."},
    ]
    messages = chat_messages(None, [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": blocks}])
    assert messages[1] == {"role": "assistant", "content": "It is.", "reasoning_content": "Let me see."}
