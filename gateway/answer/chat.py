"""The bodies of OpenAI's answers, whole and in chunks. Knows deltas and shapes; knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.messages import ModelCard, TokenLogprobs
from cluster.telemetry.kernels import ModelKernels
from gateway.answer.calls import ToolCall, joined
from gateway.answer.choice import Delta, Usage
from gateway.request.protocol import ChatCompletionRequest
from gateway.request.validator import Generation
from gateway.text.tokenizer import Tokenizer

Json = dict[str, Any]


class ChoiceText:
    """One choice of a whole answer, put together from its deltas."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.routed_experts: list[list[list[int]]] | None = None
        self._call_pieces: list[ToolCall] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.token_ids += delta.token_ids
        self._call_pieces += delta.tool_calls
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.routed_experts is not None:
            self.routed_experts = self.routed_experts or []
            self.routed_experts += delta.routed_experts
        self.finish_reason = delta.finish_reason

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Each whole, or as far as it was written."""
        return joined(self._call_pieces)


def num_bytes(piece: ChoiceText | Delta) -> int:
    """About how long the JSON of one choice gets, whole or a piece of it; not on the event loop if it is much."""
    size = len(piece.text) + 2 * len(piece.reasoning) + 8 * len(piece.token_ids)
    size += sum(len(call.arguments) for call in piece.tool_calls)
    for logprobs in (piece.logprobs, piece.prompt_logprobs):
        if logprobs:
            last = logprobs[-1]
            size += 100 * len(logprobs) * (1 + (len(last.top) if last else 0))
    if piece.routed_experts:
        size += 6 * len(piece.routed_experts) * sum(map(len, piece.routed_experts[0]))
    return size


class TokenNames:
    """What tokens are called in log-probabilities: by their text, or `token_id:5`."""

    def __init__(self, tokenizer: Tokenizer, *, by_id: bool = False, no_bytes: list[int] | None = None) -> None:
        """`no_bytes`: those of a special token, of which the text has nothing."""
        self._tokenizer = tokenizer
        self._by_id = by_id
        self._no_bytes = no_bytes

    def of(self, token_id: int) -> str:
        if self._by_id:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> list[int] | None:
        has_text = token_id not in self._tokenizer.special_ids and token_id < self._tokenizer.vocab_size
        return list(self._tokenizer.token_bytes(token_id)) if has_text else self._no_bytes


SERVICE_TIER = "default"  # OpenAI's name of the only one that there is


class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, asked: ChatCompletionRequest) -> None:
        self._head = head(generation) | ({} if asked.service_tier is None else {"service_tier": SERVICE_TIER})
        self._has_reasoning = generation.reasoning is not None and generation.tells_reasoning
        self._names = TokenNames(tokenizer, by_id=bool(asked.return_tokens_as_token_ids))
        self.return_token_ids = bool(asked.return_token_ids)
        self._prompt = {"prompt_token_ids": generation.requests[0].prompt_token_ids} if self.return_token_ids else {}
        self._prompt_token_ids = generation.requests[0].prompt_token_ids
        self._begun: set[int] = set()

    def whole(self, choices: Sequence[ChoiceText], usage: Usage) -> Json:
        return {
            **self._head,
            **self._prompt,
            **self._prompt_logprobs(choices[0].prompt_logprobs),
            "object": "chat.completion",
            "choices": [
                {
                    "index": i,
                    "message": {
                        "role": "assistant",
                        "content": choice.text,
                        "refusal": None,
                        **self._reasoning(choice.reasoning or None),
                        **({"tool_calls": [_call(call) for call in choice.tool_calls]} if choice.tool_calls else {}),
                    },
                    "logprobs": self._logprobs(choice.token_ids, choice.logprobs),
                    "finish_reason": choice.finish_reason,
                    **({"token_ids": choice.token_ids} if self.return_token_ids else {}),
                    **routed_body(choice.routed_experts),
                }
                for i, choice in enumerate(choices)
            ],
            "usage": usage_body(usage),
        }

    def _reasoning(self, reasoning: str | None) -> Json:
        """By DeepSeek's name, which most clients know, and by vLLM's newer one."""
        return {"reasoning_content": reasoning, "reasoning": reasoning} if self._has_reasoning else {}

    def _prompt_logprobs(self, logprobs: Sequence[TokenLogprobs | None] | None) -> Json:
        return prompt_logprobs_body(self._names, self._prompt_token_ids, logprobs)

    def chunk(self, delta: Delta, usage: Json | None = None) -> Json:
        """The role comes with the first chunk of each choice, the prompt's ids with the first of all."""
        prompt = {} if self._begun else self._prompt
        message: Json = {"content": delta.text} if delta.text or not (delta.tool_calls or delta.reasoning) else {}
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            message = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.reasoning:
            message |= self._reasoning(delta.reasoning)
        if delta.tool_calls:
            message["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.tool_calls]
        choice: Json = {"index": delta.index, "delta": message}
        if delta.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)
        if self.return_token_ids:
            choice["token_ids"] = delta.token_ids
        choice |= routed_body(delta.routed_experts)
        choice["finish_reason"] = delta.finish_reason
        counts = {} if usage is None else {"usage": usage}
        return {**self._head, **prompt, "object": "chat.completion.chunk", "choices": [choice], **counts}

    def usage_chunk(self, usage: Usage) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_body(usage)}

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> Json | None:
        if logprobs is None:
            return None
        return {"content": logprobs_body(self._names, token_ids, logprobs), "refusal": None}


def logprobs_body(names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[Json]:
    """One entry a token, with the most likely ones as far as they were asked for."""
    return [
        {
            **_token(names, token_id, at.token_logprob),
            "top_logprobs": [_token(names, top_id, logprob) for top_id, logprob in at.top],
        }
        for token_id, at in zip(token_ids, logprobs, strict=True)
    ]


def _token(names: TokenNames, token_id: int, logprob: float) -> Json:
    return {"token": names.of(token_id), "logprob": finite(logprob), "bytes": names.bytes_of(token_id)}


def prompt_logprobs_body(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None
) -> Json:
    """vLLM's field, where it was asked for: by token id, the prompt's own token first. The first token has none."""
    if logprobs is None:
        return {}
    entries = [
        None if at is None else _scores(names, token_id, at) for token_id, at in zip(token_ids, logprobs, strict=True)
    ]
    return {"prompt_logprobs": entries}


def _scores(names: TokenNames, token_id: int, at: TokenLogprobs) -> Json:
    """The rank of a token that is not among the most likely ones is not known."""
    ranks = {other: rank for rank, (other, _) in enumerate(at.top, start=1)}
    return {
        str(other): {"logprob": finite(logprob), "rank": ranks.get(other), "decoded_token": names.of(other)}
        for other, logprob in dict(((token_id, at.token_logprob), *at.top)).items()
    }


def _call(call: ToolCall) -> Json:
    """A later piece of one has its arguments only."""
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_body(usage: Usage) -> Json:
    """Counts as OpenAI names them."""
    reasoning = usage.reasoning_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **({} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}),
    }


def model_body(card: ModelCard, name: str, system_fingerprint: str, kernels: ModelKernels | None) -> Json:
    """One entry of /v1/models; an alias is an entry of its own, whose root is the model."""
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "manta",
        "root": card.name,
        "max_model_len": card.max_model_len,
        "fingerprint": card.fingerprint,
        "revision": card.revision,  # ours: the hub's commit, where it comes from the hub
        "permission": [],
        "type": "base",  # Mistral's fields
        "capabilities": {
            "completion_chat": card.kind == "chat",
            "completion_fim": False,
            "function_calling": card.kind == "chat",
            "vision": False,
        },
        "aliases": [other for other in (card.name, *card.aliases) if other != name],
        "max_context_length": card.max_model_len,
        "num_layers": card.num_layers,  # ours, as Hugging Face's configs name them
        "num_experts": card.num_experts,
        "num_experts_per_tok": card.top_k,
        "system_fingerprint": system_fingerprint,  # ours: that of answers, and the kernels that it is made of
        "batch_invariant": None if kernels is None else kernels.batch_invariant,
        "mixed_replicas": None if kernels is None else list(kernels.mixed),
        "kernels": None if kernels is None else _kernels_body(kernels),
    }


def _kernels_body(kernels: ModelKernels) -> Json:
    """Of each deployment those that its replicas have: one entry, unless they differ."""
    return {
        deployment: [{**one.names, "batch_invariant": one.batch_invariant} for one in kernels.distinct(deployment)]
        for deployment in kernels.deployments
    }


def head(generation: Generation) -> Json:
    """What every answer and chunk begins with."""
    return {
        "id": generation.id,
        "created": generation.created,
        "model": generation.card.name,
        "system_fingerprint": generation.system_fingerprint,
    }


def routed_body(routed_experts: list[list[list[int]]] | None) -> Json:
    """The field, where it was asked for."""
    return {} if routed_experts is None else {"routed_experts": routed_experts}


def finite(logprob: float) -> float:
    """JSON has no infinity: a token that could not be chosen has OpenAI's -9999."""
    return max(logprob, -9999.0)
