"""The conversation of a Messages body: what is no turn is refused by its path, and no number of turns is too slow."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.errors import InvalidRequest
from gateway.messages.fields import parse_count_body, parse_messages_body
from gateway.messages.input import chat_messages
from gateway.request.protocol import MAX_MESSAGES

HELLO = {"role": "user", "content": "Hello"}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 5, "messages": [HELLO], **fields}


def called(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}, **fields}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        # Both ended in a stack trace and a 500.
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice"),
        # The assistant's turn before it was gone on with.
        (
            {"messages": [HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": []}]},
            "messages[2].content",
        ),
        # These were refused by fields and places of the chat that is made of them.
        ({"system": "Be brief.", "messages": [HELLO, called(name="")]}, "messages[1].content[0].name"),
        ({"messages": [HELLO, called(id="")]}, "messages[1].content[0].id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": ""}]}]},
            "messages[0].content[0].tool_use_id",
        ),
    ],
)
def test_what_says_nothing_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    for parse in (parse_messages_body, parse_count_body):
        with pytest.raises(InvalidRequest) as refused:
            parse(asked(**fields), 100)
        assert refused.value.param == param


def test_a_system_of_no_blocks_is_none() -> None:
    assert chat_messages([], [HELLO]) == [HELLO]


def test_parts_of_a_turn_are_joined() -> None:
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "I"}]}
    chat = chat_messages(
        None, [HELLO, HELLO, thought, called(), called(id="b"), {"role": "assistant", "content": "look"}]
    )
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert chat[0]["content"] == "Hello\nHello"
    assert chat[1]["content"] == "I\nlook"
    assert chat[1]["reasoning_content"] == "Hm."
    assert [call["id"] for call in chat[1]["tool_calls"]] == ["a", "b"]


def test_many_turns_of_one_role_are_joined_once() -> None:
    """Each was joined to all before it: eight thousand short ones held the interpreter for seconds."""
    many = [{"role": "user", "content": "x" * 500}] * MAX_MESSAGES
    started = time.thread_time()
    (turn,) = chat_messages(None, many)
    assert time.thread_time() - started < 2
    assert len(turn["content"]) == 501 * MAX_MESSAGES - 1
