"""The answer of Anthropic's Messages API, whole and as events. Knows shapes; knows nothing of HTTP.

An answer is what the model thought, its text, then the calls of tools, each a block, closed when the next begins:

    message_start,
    content_block_start, content_block_delta …, content_block_stop,
    …,
    message_delta with why it ended and how many tokens it has, message_stop

Nothing signs what was thought, so its signature is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from gateway.answer.choice import Delta, Usage
from gateway.request.validator import Generation

Json = dict[str, Any]
_DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}


class MessagesShape:
    """The answer to one request: `begin`, `push` each delta, `end`; `whole` is all of it."""

    def __init__(self, generation: Generation) -> None:
        self._message: Json = {
            "id": f"msg_{generation.id.rpartition('-')[2]}",
            "type": "message",
            "role": "assistant",
            "model": generation.card.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }
        self._content: list[Json] = []  # blocks, the last of which is open
        self._pieces: list[str] = []  # of the open block: its text, or the JSON of a call's arguments
        self._is_open = False
        self._end: Json = {}

    def begin(self, usage: Usage) -> Iterator[Json]:
        """The event before the first block."""
        yield {"type": "message_start", "message": self._message | {"usage": usage_body(usage)}}

    def push(self, delta: Delta) -> Iterator[Json]:
        """The events of more text and of more of the calls."""
        for piece in delta.tool_calls:
            if not piece.id:  # of a call that has begun, before what else is new
                yield from self._more_arguments(piece.arguments)
        if delta.reasoning:
            yield from self._say("thinking", delta.reasoning)
        if delta.text:
            yield from self._say("text", delta.text)
        for piece in delta.tool_calls:
            if piece.id:
                yield from self._open({"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
                yield from self._more_arguments(piece.arguments)
        if delta.finish_reason is not None:
            self._end = {"stop_reason": _stop_reason(delta), "stop_sequence": delta.stop_string}

    def end(self, usage: Usage) -> Iterator[Json]:
        """The events after the last token."""
        yield from self._close()
        yield {"type": "message_delta", "delta": self._end, "usage": usage_body(usage)}
        yield {"type": "message_stop"}

    def whole(self, usage: Usage) -> Json:
        """All of it, after `end`."""
        return self._message | self._end | {"content": self._content, "usage": usage_body(usage)}

    def _say(self, kind: str, text: str) -> Iterator[Json]:
        name, field = _DELTAS[kind]
        if not self._is_open or self._content[-1]["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            yield from self._open({"type": kind, field: "", **signature})
        yield self._delta({"type": name, field: text})
        self._pieces.append(text)

    def _more_arguments(self, text: str) -> Iterator[Json]:
        if text:
            yield self._delta({"type": "input_json_delta", "partial_json": text})
            self._pieces.append(text)

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._content.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if not self._is_open:
            return
        block, text = self._content[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _arguments(text)
        else:
            block[_DELTAS[block["type"]][1]] = text
        self._pieces, self._is_open = [], False
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def usage_body(usage: Usage) -> Json:
    """Tokens of the prompt that were in the cache are counted apart here."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _arguments(text: str) -> Json:
    """None where `max_tokens` cut them: what is no JSON has no place in a whole answer."""
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _stop_reason(delta: Delta) -> str:
    match delta.finish_reason:
        case "length":
            return "max_tokens"
        case "tool_calls":
            return "tool_use"
        case _:
            return "end_turn" if delta.stop_string is None else "stop_sequence"
