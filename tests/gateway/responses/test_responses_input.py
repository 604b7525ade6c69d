"""The conversation of a Responses body: items of one answer are one turn, and no number of them is too slow."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gateway.request.protocol import MAX_MESSAGES
from gateway.responses.input import chat_messages

CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def test_items_of_one_answer_are_one_turn() -> None:
    items = [
        thought("Hm, "),
        thought("well."),
        CALL,
        said("I "),
        said(""),
        said("look."),
        {"role": "user", "content": "So?"},
    ]
    answer, user = chat_messages(None, items)
    assert (answer["content"], answer["reasoning_content"]) == ("I look.", "Hm, well.")
    assert answer.keys() == {"role", "content", "reasoning_content", "tool_calls"}
    assert user == {"role": "user", "content": "So?"}


@pytest.mark.parametrize("item", [said("x" * 500), thought("x" * 500)])
def test_many_items_of_one_answer_are_joined_once(item: dict[str, Any]) -> None:
    """Each was joined to all before it, for as long as the square of their number."""
    started = time.thread_time()
    (turn,) = chat_messages(None, [CALL, *[item] * MAX_MESSAGES] if "role" in item else [*[item] * MAX_MESSAGES, CALL])
    assert time.thread_time() - started < 2
    assert len(turn["content"] + turn.get("reasoning_content", "")) == 500 * MAX_MESSAGES
