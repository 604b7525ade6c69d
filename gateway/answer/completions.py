"""`text_completion`, whole and in chunks, with the prompt's text and log-probabilities when they are echoed.

Knows deltas and shapes; knows nothing of HTTP. Offsets count characters of the choice's `text`; a token that has no
text of its own (a special one, or a part of a character) begins where the next one does.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.messages import TokenLogprobs
from gateway.answer.chat import (
    ChoiceText,
    Json,
    TokenNames,
    finite,
    head,
    prompt_logprobs_body,
    routed_body,
    usage_body,
)
from gateway.answer.choice import Delta, Usage
from gateway.request.protocol import SamplingFields
from gateway.request.validator import Generation
from gateway.text.detokenizer import Detokenizer
from gateway.text.tokenizer import Tokenizer


class CompletionShape:
    """The bodies of one request's answer."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, asked: SamplingFields) -> None:
        self._head = {**head(generation), "object": "text_completion"}
        self._generation = generation
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, by_id=bool(asked.return_tokens_as_token_ids))
        self.return_token_ids = bool(asked.return_token_ids)
        self._begun: dict[int, _Offsets] = {}

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Json:
        bodies = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return {**self._head, "choices": bodies, "usage": usage_body(usage)}

    def chunk(self, delta: Delta, usage: Json | None = None) -> Json:
        """The first chunk of a choice has what is echoed of its prompt."""
        counts = {} if usage is None else {"usage": usage}
        return {**self._head, "choices": [self._choice(delta.index, delta)], **counts}

    def usage_chunk(self, usage: Usage) -> Json:
        return {**self._head, "choices": [], "usage": usage_body(usage)}

    def _choice(self, index: int, new: ChoiceText | Delta) -> Json:
        is_first = index not in self._begun
        prompt = self._generation.requests[index].prompt_token_ids
        echo = self._generation.echo[index] if self._generation.echo and is_first else None
        if is_first:
            self._begun[index] = _Offsets(self._tokenizer, () if self._generation.echo else prompt[-8:])
        choice: Json = {
            "index": index,
            "text": new.text if echo is None else echo + new.text,
            "logprobs": None,
            "finish_reason": new.finish_reason,
        }
        if new.logprobs is not None:
            token_ids: Sequence[int] = new.token_ids
            logprobs: Sequence[TokenLogprobs | None] = new.logprobs
            if echo is not None:
                token_ids = (*prompt, *token_ids)
                logprobs = (*(new.prompt_logprobs or ()), *logprobs)
            choice["logprobs"] = self._logprobs(token_ids, logprobs, self._begun[index])
        if self._generation.tells_prompt_logprobs and is_first:
            choice |= prompt_logprobs_body(self._names, prompt, new.prompt_logprobs)
        if self.return_token_ids:
            choice["token_ids"] = list(new.token_ids)
            if is_first:
                choice["prompt_token_ids"] = prompt
        return choice | routed_body(new.routed_experts)

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: _Offsets) -> Json:
        return {
            "tokens": list(map(self._names.of, token_ids)),
            "token_logprobs": [None if at is None else finite(at.token_logprob) for at in logprobs],
            "top_logprobs": [
                None if at is None else self._top(token_id, at)
                for token_id, at in zip(token_ids, logprobs, strict=True)
            ],
            "text_offset": [offsets.push(i) for i in token_ids],
        }

    def _top(self, token_id: int, at: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one; of tokens with one spelling, the likeliest."""
        top: dict[str, float] = {}
        for other, logprob in (*at.top, (token_id, at.token_logprob)):
            top.setdefault(self._names.of(other), finite(logprob))
        return top


class _Offsets:
    """Where each token of one choice begins in its text."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer, context)
        self._offset = 0

    def push(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._detokenizer.push(token_id))
        return offset
