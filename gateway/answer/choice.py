"""One choice of an answer: its tokens become text, cut at stop strings, and calls of tools. Knows no streams.

Stop strings are looked for in text only: a call ends where its arguments do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import Unavailable
from cluster.messages import FinishReason, Request, TokenChunk, TokenLogprobs, ToolCallGrammar
from gateway.answer.tools_reader import ToolCall, tool_call_reader
from gateway.request.validator import Generation
from gateway.text.detokenizer import Detokenizer
from gateway.text.stop_strings import StopStrings
from gateway.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one choice. The last delta of a choice, and only it, has a `finish_reason`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first delta, when asked for
    routed_experts: list[list[list[int]]] | None = None  # [token][layer][top_k] when asked for
    tool_calls: tuple[ToolCall, ...] = ()  # at most one piece of each

    @property
    def says_something(self) -> bool:
        """Whether there is more than token ids in it."""
        return bool(
            self.text
            or self.tool_calls
            or self.finish_reason
            or self.logprobs
            or self.prompt_logprobs
            or self.routed_experts
        )


@dataclass(slots=True)
class Usage:
    """Token counts of one request, summed over its choices; complete once its deltas are."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


class Choice:
    """One choice on its way to text."""

    def __init__(
        self, index: int, request: Request, generation: Generation, tokenizer: Tokenizer, usage: Usage
    ) -> None:
        context = request.prompt_token_ids[-8:] if generation.continues_prompt else ()
        self.request = request
        self.finished = False
        self._index = index
        self._usage = usage
        self._num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stop_strings = StopStrings(generation.stop)
        grammar = request.grammar
        self._tool_calls = tool_call_reader(grammar) if isinstance(grammar, ToolCallGrammar) and grammar.tools else None
        self._begin = generation.begin  # until it is sent
        self._min_tokens = generation.min_tokens
        self._is_prompt_only = generation.is_prompt_only
        self._top_k = generation.card.top_k

    def push(self, chunk: TokenChunk) -> Delta:
        """What the chunk adds; its text may be empty."""
        if chunk.first_position != self._num_tokens:
            raise Unavailable(f"a token was lost or doubled at position {self._num_tokens}")
        if self._num_tokens == 0 and self.request.choice_index == 0:
            self._usage.cached_tokens += chunk.num_cached_tokens
        begin, self._begin = self._begin, ""
        if self._is_prompt_only:
            self.finished = True
            no_logprobs = None if self.request.sampling.logprobs is None else ()
            return Delta(self._index, begin, (), no_logprobs, "length", chunk.prompt_logprobs)
        text = ""
        used = 0
        finish_reason = chunk.finish_reason
        for token_id in chunk.token_ids:
            used += 1
            if used == len(chunk.token_ids) and chunk.stop_token_id is not None:
                break  # the token that ended the sequence has no text
            text += self._cut(self._own(token_id, self._detokenizer.push(token_id)), used)
            if self._stop_strings.is_stopped():
                finish_reason = "stop"
                break
        if finish_reason is not None and not self._stop_strings.is_stopped():
            text += self._cut(self._rest(finish_reason), used) + self._stop_strings.flush()
            if self._stop_strings.is_stopped():
                finish_reason = "stop"
        calls: tuple[ToolCall, ...] = ()
        reason: FinishReason | Literal["tool_calls"] | None = finish_reason
        if self._tool_calls is not None:
            calls = self._tool_calls.calls.take()
            if finish_reason == "stop" and self._tool_calls.calls.num_calls and self._tool_calls.is_complete:
                reason = "tool_calls"
        self._num_tokens += used
        self._usage.completion_tokens += used
        self.finished = finish_reason is not None
        logprobs = chunk.logprobs[:used] if chunk.logprobs is not None else None
        routed = self._routed_experts(chunk, used)
        used_ids = chunk.token_ids[:used]
        return Delta(self._index, begin + text, used_ids, logprobs, reason, chunk.prompt_logprobs, routed, calls)

    def _routed_experts(self, chunk: TokenChunk, used: int) -> list[list[list[int]]] | None:
        if chunk.routed_experts is None or not used:
            return None
        each = np.frombuffer(chunk.routed_experts, np.uint8).reshape(len(chunk.token_ids), -1, max(1, self._top_k))
        lists: list[list[list[int]]] = each[:used].tolist()
        return lists

    def _own(self, token_id: int, piece: str) -> str:
        """What of a piece is the answer's own text, and no call of a tool."""
        return piece if self._tool_calls is None else self._tool_calls.push(token_id, piece)

    def _rest(self, finish_reason: FinishReason) -> str:
        """What was held back, once nothing follows."""
        rest = self._own(-1, self._detokenizer.flush())
        return rest if self._tool_calls is None else rest + self._tool_calls.flush(has_ended=finish_reason == "stop")

    def _cut(self, piece: str, used: int) -> str:
        """Stop strings count only in text that comes after `min_tokens`."""
        if not piece or self._num_tokens + used <= self._min_tokens:
            return piece
        return self._stop_strings.push(piece)
