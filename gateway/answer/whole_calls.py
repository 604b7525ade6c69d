"""Streams each call of a tool whole, as Mistral's API does: its clients parse every piece. Knows deltas.

Those clients say `Accept: text/event-stream`, where OpenAI's say `application/json`. Others who say so read whole calls
as well as pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gateway.answer.calls import ToolCall, joined
from gateway.answer.choice import Delta


def wants_whole_calls(headers: Mapping[str, str]) -> bool:
    """Whether the client is one of Mistral's, or one like them."""
    return "text/event-stream" in headers.get("accept", "")


class WholeCalls:
    """`push` the deltas of all choices: pieces wait until their call is over."""

    def __init__(self) -> None:
        self._held: dict[int, list[ToolCall]] = {}  # by choice

    def push(self, delta: Delta) -> Delta:
        """The same, with what it completes in place of its pieces."""
        held = self._held.setdefault(delta.index, [])
        over: list[ToolCall] = []
        for piece in delta.tool_calls:
            if held and held[-1].index != piece.index:
                over += held
                held.clear()
            held.append(piece)
        if delta.finish_reason is not None:
            over += held
        return replace(delta, tool_calls=joined(over)) if delta.tool_calls or over else delta
