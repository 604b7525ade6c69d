"""One choice of an answer: its tokens become text, cut at stop strings, with their counts. Knows no streams."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import Unavailable
from cluster.messages import FinishReason, Request, TokenChunk, TokenLogprobs
from gateway.detokenizer import Detokenizer
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Tokenizer
from gateway.validator import Generation


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one choice. The last delta of a choice, and only it, has a `finish_reason`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first delta, when asked for


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
        self._min_tokens = generation.min_tokens
        self._is_prompt_only = generation.is_prompt_only

    def push(self, chunk: TokenChunk) -> Delta:
        """What the chunk adds; its text may be empty."""
        if chunk.first_position != self._num_tokens:
            raise Unavailable(f"a token was lost or doubled at position {self._num_tokens}")
        if self._num_tokens == 0 and self.request.choice_index == 0:
            self._usage.cached_tokens += chunk.num_cached_tokens
        if self._is_prompt_only:
            self.finished = True
            no_logprobs = None if self.request.sampling.logprobs is None else ()
            return Delta(self._index, "", (), no_logprobs, "length", chunk.prompt_logprobs)
        text = ""
        used = 0
        finish_reason = chunk.finish_reason
        for token_id in chunk.token_ids:
            used += 1
            if used == len(chunk.token_ids) and chunk.stop_token_id is not None:
                break  # the token that ended the sequence has no text
            text += self._cut(self._detokenizer.push(token_id), used)
            if self._stop_strings.is_stopped():
                finish_reason = "stop"
                break
        if finish_reason is not None and not self._stop_strings.is_stopped():
            text += self._cut(self._detokenizer.flush(), used) + self._stop_strings.flush()
            if self._stop_strings.is_stopped():
                finish_reason = "stop"
        self._num_tokens += used
        self._usage.completion_tokens += used
        self.finished = finish_reason is not None
        logprobs = chunk.logprobs[:used] if chunk.logprobs is not None else None
        return Delta(self._index, text, chunk.token_ids[:used], logprobs, finish_reason, chunk.prompt_logprobs)

    def _cut(self, piece: str, used: int) -> str:
        """Stop strings count only in text that comes after `min_tokens`."""
        if not piece or self._num_tokens + used <= self._min_tokens:
            return piece
        return self._stop_strings.push(piece)
