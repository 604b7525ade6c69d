"""The answer of OpenAI's Responses API, whole and as events. Knows shapes; knows nothing of HTTP.

An answer's output is what the model thought, a message with one part, then the calls of functions, or whatever order it
writes them in, each an item, closed when the next begins:

    response.created, response.in_progress,
    response.output_item.added, response.content_part.added, response.reasoning_text.delta …,
    response.reasoning_text.done, response.content_part.done, response.output_item.done,
    response.output_item.added, response.content_part.added, response.output_text.delta …,
    response.output_text.done, response.content_part.done, response.output_item.done,
    response.output_item.added, response.function_call_arguments.delta …, …arguments.done, response.output_item.done,
    response.completed, or response.incomplete at max_output_tokens

An answer of calls alone has no message, nor has one that ended in its reasoning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gateway.answer.calls import ToolCall, joined
from gateway.answer.chat import SERVICE_TIER, TokenNames, logprobs_body
from gateway.answer.choice import Delta, Usage
from gateway.answer.held_scores import HeldScores
from gateway.request.validator import Generation
from gateway.responses.fields import ReasoningOptions, ResponsesRequest
from gateway.responses.tools import call_item
from gateway.text.tokenizer import Tokenizer

Json = dict[str, Any]


class ResponsesShape:
    """The answer to one request: `begin`, `push` each delta, `end`; `whole` is what the last event has."""

    def __init__(self, generation: Generation, body: ResponsesRequest, tokenizer: Tokenizer) -> None:
        random = generation.id.rpartition("-")[2]
        sampling = generation.requests[0].sampling
        self._random = random
        self._names = TokenNames(tokenizer, no_bytes=[])  # null is no value of theirs here
        self._text: str | None = None  # of the message that is open
        self._thought: str | None = None  # the reasoning, while it is open
        self._begins_with_text = not body.tools and generation.reasoning is None
        self._held = HeldScores("ask for fewer")  # streamed or not: the last event has all
        self._logprobs: list[Json] = []  # of its tokens
        self._untold: list[Json] = []  # of tokens that no text has come of so far
        self._call: list[ToolCall] = []  # pieces of the call that is open
        self._output: list[Json] = []  # complete items
        self._number = 0
        self._status = "completed"
        self._response: Json = {
            "id": f"resp_{random}",
            "object": "response",
            "created_at": generation.created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": generation.card.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": (body.reasoning or ReasoningOptions()).model_dump(),
            **({} if body.service_tier is None else {"service_tier": SERVICE_TIER}),
            "store": False,
            "temperature": sampling.temperature,
            "text": {
                "format": (body.text and body.text.format) or {"type": "text"},
                **({"verbosity": body.text.verbosity} if body.text and body.text.verbosity else {}),
            },
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()],
            "top_logprobs": sampling.logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": body.truncation or "disabled",
        }

    def begin(self, usage: Usage) -> Iterator[Json]:  # noqa: ARG002
        """The events before the first token."""
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        if self._begins_with_text:
            yield from self._open_message()

    def push(self, delta: Delta) -> Iterator[Json]:
        """The events of more text and of more of the calls. Raises InvalidRequest for more than may be held."""
        self._held.add(delta)
        if delta.finish_reason == "length":
            self._status = "incomplete"
        if delta.logprobs:
            self._untold += logprobs_body(self._names, delta.token_ids, delta.logprobs)
        self._untold = self._untold[delta.num_reasoning_tokens :]
        of_open = [piece for piece in delta.tool_calls if not piece.id]
        for piece in of_open:  # of a call that has begun, before what else is new
            yield from self._more_arguments(piece)
        if delta.reasoning:
            yield from self._more_reasoning(delta.reasoning)
        if delta.text:
            if self._text is None:
                yield from self._close_item("completed")
                yield from self._open_message()
            self._text = (self._text or "") + delta.text
            told, self._untold = self._untold, []
            self._logprobs += told
            yield self._part_event("response.output_text.delta", delta=delta.text, logprobs=told)
        for piece in delta.tool_calls[len(of_open) :]:
            self._untold = []  # they were of calls
            yield from self._close_item("completed")
            self._call = [replace(piece, arguments="")]
            yield self._item_event("response.output_item.added", self._call_item("in_progress"))
            yield from self._more_arguments(piece)

    def end(self, usage: Usage) -> Iterator[Json]:
        """The events after the last token."""
        if not self._output and self._text is None and self._thought is None and not self._call:
            yield from self._open_message()
        yield from self._close_item(self._status)
        yield self._event(f"response.{self._status}", response=self.whole(usage))

    def whole(self, usage: Usage) -> Json:
        """All of it, after `end`."""
        return self._response | {
            "status": self._status,
            "incomplete_details": None if self._status == "completed" else {"reason": "max_output_tokens"},
            "output": self._output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def error(self, body: Json) -> Json:
        """The event that ends a stream in the middle; `body` is the error as other routes answer it."""
        return self._event("error", **body, **{key: body["error"][key] for key in ("code", "message", "param")})

    def _open_message(self) -> Iterator[Json]:
        self._text = ""
        yield self._item_event("response.output_item.added", self._message("in_progress"))
        yield self._part_event("response.content_part.added", part=_part("", []))

    def _more_reasoning(self, text: str) -> Iterator[Json]:
        if self._thought is None:
            yield from self._close_item("completed")  # gpt-oss thinks again after a text or a call
            self._thought = ""
            yield self._item_event("response.output_item.added", self._reasoning("in_progress"))
            yield self._part_event("response.content_part.added", part=_reasoning_part(""))
        self._thought += text
        yield self._part_event("response.reasoning_text.delta", delta=text)

    def _more_arguments(self, piece: ToolCall) -> Iterator[Json]:
        self._untold = []
        if piece.arguments:
            self._call.append(piece)
            yield self._call_event("response.function_call_arguments.delta", delta=piece.arguments)

    def _close_item(self, status: str) -> Iterator[Json]:
        """The reasoning, message or call that is open, if one is."""
        if self._thought is not None:
            yield self._part_event("response.reasoning_text.done", text=self._thought)
            part = _reasoning_part(self._thought)
            yield self._part_event("response.content_part.done", part=part)
            item = self._reasoning(status, part)
        elif self._text is not None:
            logprobs = self._logprobs + self._untold  # the last are of what ended the answer
            yield self._part_event("response.output_text.done", text=self._text, logprobs=logprobs)
            part = _part(self._text, logprobs)
            yield self._part_event("response.content_part.done", part=part)
            item = self._message(status, part)
            self._untold = []
        elif self._call:
            item = self._call_item(status)
            said = {"name": item["name"], "arguments": item["arguments"]}
            yield self._call_event("response.function_call_arguments.done", **said)
        else:
            return
        yield self._item_event("response.output_item.done", item)
        self._output.append(item)
        self._thought, self._text, self._call, self._logprobs = None, None, [], []

    def _call_item(self, status: str) -> Json:
        [call] = joined(self._call)
        return call_item(self._call_item_id, call, status=status)

    @property
    def _call_item_id(self) -> str:
        return f"fc_{self._random}{self._call[0].index}"

    def _message(self, status: str, part: Json | None = None) -> Json:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if part is None else [part],
        }

    def _reasoning(self, status: str, part: Json | None = None) -> Json:
        content = [] if part is None else [part]
        return {"id": self._message_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    @property
    def _message_id(self) -> str:
        """That of the message, or of the reasoning, which is open."""
        return f"{'msg' if self._thought is None else 'rs'}_{self._random}{len(self._output)}"

    def _item_event(self, kind: str, item: Json) -> Json:
        return self._event(kind, output_index=len(self._output), item=item)

    def _part_event(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self._message_id, output_index=len(self._output), content_index=0, **fields)

    def _call_event(self, kind: str, **fields: Any) -> Json:
        return self._event(kind, item_id=self._call_item_id, output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}


def _reasoning_part(text: str) -> Json:
    return {"type": "reasoning_text", "text": text}


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
