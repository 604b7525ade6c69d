"""One choice of an answer: its tokens become reasoning, text that is cut at stop strings, and calls of tools.

Knows no streams. Stop strings are looked for in text only: reasoning goes on, and a call ends where its arguments do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import Unavailable
from cluster.messages import (
    FinishReason,
    HarmonyGrammar,
    HarmonyTokens,
    ReasonedGrammar,
    Request,
    TokenChunk,
    TokenLogprobs,
    ToolCallGrammar,
)
from gateway.answer.calls import ToolCall
from gateway.answer.harmony_reader import HarmonyCalls, HarmonyReader
from gateway.answer.reasoning_reader import ReasoningReader
from gateway.answer.tools_reader import CallReader, tool_call_reader
from gateway.request.validator import Generation
from gateway.text.detokenizer import Detokenizer
from gateway.text.reasoning import Reasoning
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
    reasoning: str = ""  # what the model thought before its text
    num_reasoning_tokens: int = 0  # so many more of the tokens so far are of it
    stop_string: str | None = None  # that ended the choice

    @property
    def says_something(self) -> bool:
        """Whether there is more than token ids in it."""
        return bool(
            self.text
            or self.reasoning
            or self.tool_calls
            or self.finish_reason
            or self.logprobs
            or self.prompt_logprobs
            or self.routed_experts
        )


@dataclass(slots=True)
class Usage:
    """Token counts of one request, summed over its choices; complete once its deltas are. And how long it waited."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None  # of those completed; None: the model does not reason apart
    queue_s: float | None = None  # at the coordinator, of the choice that waited longest; None: no token came


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
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stop_strings = StopStrings(generation.stop)
        self._begin = generation.begin  # until it is sent
        self._thought: list[str] = []  # since the last delta
        self._tells_reasoning = generation.tells_reasoning
        self._num_reasoning_tokens = 0  # that are in the usage
        grammar = request.grammar
        if isinstance(grammar, ReasonedGrammar | HarmonyGrammar):
            grammar = grammar.answer
        tools = grammar if isinstance(grammar, ToolCallGrammar) and grammar.tools else None
        self._reasoning = (
            None if generation.reasoning is None else _reasoning_reader(generation.reasoning, generation.begin, tools)
        )
        if self._reasoning is not None:
            usage.reasoning_tokens = usage.reasoning_tokens or 0
            thought, self._begin = self._reasoning.push(-1, self._begin)
            self._thought.append(thought)
        self._tool_calls: CallReader | HarmonyCalls | None = None
        if isinstance(self._reasoning, HarmonyReader):
            self._tool_calls = self._reasoning.tool_calls
        elif tools is not None:
            self._tool_calls = tool_call_reader(tools)
        self._min_tokens = generation.min_tokens
        self._is_prompt_only = generation.is_prompt_only
        self._top_k = generation.card.top_k

    def push(self, chunk: TokenChunk) -> Delta:
        """What the chunk adds; its text may be empty."""
        if chunk.first_position != self._num_tokens:
            raise Unavailable(f"a token was lost or doubled at position {self._num_tokens}")
        if self._num_tokens == 0:
            self._usage.queue_s = max(self._usage.queue_s or 0.0, chunk.queue_s)
            if self.request.choice_index == 0:
                self._usage.cached_tokens += chunk.num_cached_tokens
        begin, self._begin = self._begin, ""
        if self._is_prompt_only:
            self.finished = True
            no_logprobs = None if self.request.sampling.logprobs is None else ()
            thought = self._take_thought()
            return Delta(self._index, begin, (), no_logprobs, "length", chunk.prompt_logprobs, reasoning=thought)
        text = ""
        used = 0
        finish_reason = chunk.finish_reason
        for token_id in chunk.token_ids:
            used += 1
            if used == len(chunk.token_ids) and chunk.stop_token_id is not None:
                break  # the token that ended the sequence has no text
            text += self._cut(self._own(token_id, self._piece(token_id)), used)
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
        thought = self._take_thought()
        num_reasoning = self._count_reasoning()
        self.finished = finish_reason is not None
        logprobs = chunk.logprobs[:used] if chunk.logprobs is not None else None
        routed = self._routed_experts(chunk, used)
        used_ids = chunk.token_ids[:used]
        return Delta(
            *(self._index, begin + text, used_ids, logprobs, reason),
            prompt_logprobs=chunk.prompt_logprobs,
            routed_experts=routed,
            tool_calls=calls,
            stop_string=self._stop_strings.found,
            reasoning=thought,
            num_reasoning_tokens=num_reasoning,
        )

    def _routed_experts(self, chunk: TokenChunk, used: int) -> list[list[list[int]]] | None:
        if chunk.routed_experts is None or not used:
            return None
        each = np.frombuffer(chunk.routed_experts, np.uint16).reshape(len(chunk.token_ids), -1, max(1, self._top_k))
        lists: list[list[list[int]]] = each[:used].tolist()
        return lists

    def _piece(self, token_id: int) -> str:
        """What a token adds to the text. At a tag that is a token by itself, what was held back before it."""
        if self._reasoning is None or not self._reasoning.is_tag(token_id):
            return self._detokenizer.push(token_id)
        rest = self._detokenizer.flush()
        self._detokenizer = Detokenizer(self._tokenizer)
        return rest

    def _own(self, token_id: int, piece: str) -> str:
        """What of a piece is the answer's own text, and neither reasoning nor a call of a tool."""
        if self._reasoning is not None:
            thought, piece = self._reasoning.push(token_id, piece)
            self._thought.append(thought)
            if not self._reasoning.is_over:
                token_id = -1  # no call begins in a thought
        return piece if self._tool_calls is None else self._tool_calls.push(token_id, piece)

    def _take_thought(self) -> str:
        thought, self._thought = self._thought, []
        return "".join(thought) if self._tells_reasoning else ""

    def _count_reasoning(self) -> int:
        if self._reasoning is None:
            return 0
        new = self._reasoning.num_tokens - self._num_reasoning_tokens
        self._num_reasoning_tokens += new
        self._usage.reasoning_tokens = (self._usage.reasoning_tokens or 0) + new
        return new

    def _rest(self, finish_reason: FinishReason) -> str:
        """What was held back, once nothing follows."""
        rest = self._own(-1, self._detokenizer.flush())
        if self._reasoning is not None:
            thought, held = self._reasoning.flush()
            self._thought.append(thought)
            rest += held if self._tool_calls is None else self._tool_calls.push(-1, held)
        return rest if self._tool_calls is None else rest + self._tool_calls.flush(has_ended=finish_reason == "stop")

    def _cut(self, piece: str, used: int) -> str:
        """Stop strings count only in text that comes after `min_tokens`."""
        if not piece or self._num_tokens + used <= self._min_tokens:
            return piece
        return self._stop_strings.push(piece)


def _reasoning_reader(
    reasoning: Reasoning, begin: str, tools: ToolCallGrammar | None
) -> ReasoningReader | HarmonyReader:
    """`begin`: text of the message that is continued, where the answer repeats it: it is read with the rest."""
    if isinstance(reasoning.tags, HarmonyTokens):
        names = frozenset(name for name, _ in tools.tools) if tools else frozenset[str]()
        return HarmonyReader(reasoning.tags, names, in_answer=reasoning.stage == "is over")
    return ReasoningReader(reasoning.tags, "may come" if begin else reasoning.stage)
