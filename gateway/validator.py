"""One validator for both doors: a parsed body becomes a Generation, or an InvalidRequest that names the field.

Knows bounds, defaults and tokenization; knows nothing of HTTP, gRPC or streams.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import GatewayConfig
from cluster.errors import ContextTooLong, InvalidRequest
from cluster.messages import ModelCard, Request, SamplingParams
from gateway.protocol import (
    MAX_STOP_STRINGS,
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    SamplingFields,
    text_of,
)
from gateway.tokenizer import ChatMessage, Tokenizer

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True)
class Generation:
    """One client request: what to ask the coordinators for, and how the answer is shaped."""

    id: str
    created: int  # Unix time in seconds
    card: ModelCard
    requests: tuple[Request, ...]  # one per choice; choice = position here
    num_prompt_tokens: int  # summed over prompts
    stop: tuple[str, ...]
    min_tokens: int
    continues_prompt: bool  # the text goes on from a raw prompt, so its first space counts
    deadline: float  # Unix time in seconds


class Validator:
    """Makes Generations for one model."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._config = config

    def chat(self, body: ChatCompletionRequest, timeout_s: float | None = None) -> Generation:
        """Raises InvalidRequest."""
        messages = _chat_messages(body.messages)
        if body.top_logprobs is not None:
            if not body.logprobs:
                raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
            _between("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens, field = body.max_tokens, "max_tokens"
        if body.max_completion_tokens is not None:
            max_tokens, field = body.max_completion_tokens, "max_completion_tokens"
        options = self._options(body)
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        prompt = self._tokenizer.encode_chat(messages)
        return self._generation(
            "chatcmpl-", body, [prompt], "messages", max_tokens, field, logprobs, options, timeout_s
        )

    def completion(self, body: CompletionRequest, timeout_s: float | None = None) -> Generation:
        """Raises InvalidRequest."""
        if body.logprobs is not None:
            _between("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
        options = self._options(body)
        prompts = self._prompts(body.prompt, body.n or 1)
        return self._generation(
            "cmpl-", body, prompts, "prompt", body.max_tokens, "max_tokens", body.logprobs, options, timeout_s
        )

    def _generation(
        self,
        prefix: str,
        body: SamplingFields,
        prompts: Sequence[tuple[int, ...]],
        prompt_field: str,
        max_tokens: int | None,
        max_tokens_field: str,
        logprobs: int | None,
        options: dict[str, Any],
        timeout_s: float | None,
    ) -> Generation:
        n = 1 if body.n is None else body.n
        self._check_choices(n, len(prompts))
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequest(f"{max_tokens_field}: must be at least 1, got {max_tokens}", param=max_tokens_field)
        seed = body.random_seed if body.seed is None else body.seed
        if seed is None:
            seed = secrets.randbits(63)
        own_id = prefix + uuid.uuid4().hex
        timeout = min(timeout_s or self._config.request_timeout_s, self._config.request_timeout_s)
        deadline = time.time() + timeout
        requests = []
        for i, prompt in enumerate(prompts):
            tokens = self._max_tokens(len(prompt), prompt_field, max_tokens, max_tokens_field)
            if options["min_tokens"] > tokens:
                raise InvalidRequest(
                    f"min_tokens: must not be over max_tokens ({tokens}), got {options['min_tokens']}", "min_tokens"
                )
            sampling = SamplingParams(max_tokens=tokens, logprobs=logprobs, **options)
            # A seeded prompt gets the same answer alone and in a list, so every prompt counts its choices from 0.
            prompt_id = own_id if len(prompts) == 1 else f"{own_id}-{i}"
            requests += [
                Request(
                    request_id=prompt_id,
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    seed=seed & (2**63 - 1),
                    choice_index=choice,
                    deadline=deadline,
                )
                for choice in range(n)
            ]
        return Generation(
            id=own_id,
            created=int(time.time()),
            card=self._card,
            requests=tuple(requests),
            num_prompt_tokens=sum(len(prompt) for prompt in prompts),
            stop=tuple(body.stop or ()),
            min_tokens=options["min_tokens"],
            continues_prompt=prompt_field == "prompt",
            deadline=deadline,
        )

    def _options(self, body: SamplingFields) -> dict[str, Any]:
        """SamplingParams' fields other than max_tokens and logprobs, checked."""
        card = self._card
        temperature = _between("temperature", _default(body.temperature, card.default_temperature), 0, 2)
        top_p = _between("top_p", _default(body.top_p, card.default_top_p), 0, 1)
        if top_p == 0:
            raise InvalidRequest("top_p: must be over 0, got 0", param="top_p")
        repetition_penalty = _between("repetition_penalty", _default(body.repetition_penalty, 1.0), 0, 10)
        if repetition_penalty == 0:
            raise InvalidRequest("repetition_penalty: must be over 0, got 0", param="repetition_penalty")
        if body.n is not None:
            _between("n", body.n, 1, self._config.max_choices)
        for name, seed in (("seed", body.seed), ("random_seed", body.random_seed)):
            if seed is not None:
                _between(name, seed, -(2**63), 2**63 - 1)
        stop_token_ids = body.stop_token_ids or []
        _at_most("stop_token_ids", len(stop_token_ids), MAX_STOP_TOKEN_IDS)
        for i, token_id in enumerate(stop_token_ids):
            self._check_token_id(token_id, f"stop_token_ids[{i}]")
        _check_stop(body.stop or [])
        return {
            "min_tokens": _between("min_tokens", _default(body.min_tokens, 0), 0, card.max_model_len),
            "temperature": float(temperature),
            "top_p": float(top_p),
            "top_k": max(0, _between("top_k", _default(body.top_k, 0), -1, 2**31 - 1)),
            "min_p": float(_between("min_p", _default(body.min_p, 0.0), 0, 1)),
            "repetition_penalty": float(repetition_penalty),
            "presence_penalty": float(_between("presence_penalty", _default(body.presence_penalty, 0.0), -2, 2)),
            "frequency_penalty": float(_between("frequency_penalty", _default(body.frequency_penalty, 0.0), -2, 2)),
            "logit_bias": self._logit_bias(body.logit_bias or {}),
            "stop_token_ids": tuple(stop_token_ids),
            "ignore_eos": bool(body.ignore_eos),
        }

    def _logit_bias(self, logit_bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
        _at_most("logit_bias", len(logit_bias), MAX_LOGIT_BIAS)
        pairs = {}
        for key, bias in logit_bias.items():
            path = f"logit_bias.{key}"
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise InvalidRequest(f"{path}: the key must be a token id", param=path)
            self._check_token_id(int(key), path)
            pairs[int(key)] = float(_between(path, bias, -100, 100))
        return tuple(sorted(pairs.items()))

    def _prompts(self, prompt: Any, n: int) -> list[tuple[int, ...]]:
        """A string, a list of strings, token ids, or a list of token-id lists."""
        if prompt is None:
            raise InvalidRequest("prompt: field required", param="prompt")
        if isinstance(prompt, str):
            return [self._encode(prompt, "prompt")]
        expected = "prompt: expected a string, a list of strings, token ids, or a list of token-id lists"
        if not isinstance(prompt, list):
            raise InvalidRequest(expected, param="prompt")
        if not prompt:
            raise InvalidRequest("prompt: must not be empty", param="prompt")
        if all(type(item) is int for item in prompt):
            return [self._token_ids(prompt, "prompt")]
        self._check_choices(n, len(prompt))
        if all(isinstance(item, str) for item in prompt):
            return [self._encode(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
        if all(isinstance(item, list) for item in prompt):
            return [self._token_ids(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
        raise InvalidRequest(expected, param="prompt")

    def _encode(self, text: str, path: str) -> tuple[int, ...]:
        self._check_length(len(text), path)
        token_ids = self._tokenizer.encode(text)
        if not token_ids:
            raise InvalidRequest(f"{path}: must not be empty", param=path)
        return token_ids

    def _check_length(self, num_chars: int, path: str) -> None:
        """Refuses a text that is too long whatever its tokens are, before it is tokenized."""
        least = num_chars // self._tokenizer.max_token_chars
        if least > self._card.max_model_len:
            raise ContextTooLong(
                f"{path}: {num_chars} characters are at least {least} tokens, over the model's context of "
                f"{self._card.max_model_len}",
                param=path,
            )

    def _token_ids(self, token_ids: list[Any], path: str) -> tuple[int, ...]:
        if not token_ids:
            raise InvalidRequest(f"{path}: must not be empty", param=path)
        for i, token_id in enumerate(token_ids):
            if type(token_id) is not int:
                raise InvalidRequest(f"{path}[{i}]: expected a token id", param=f"{path}[{i}]")
            self._check_token_id(token_id, f"{path}[{i}]")
        return tuple(token_ids)

    def _check_token_id(self, token_id: int, path: str) -> None:
        if not 0 <= token_id < self._card.vocab_size:
            raise InvalidRequest(
                f"{path}: token id {token_id} is not in the vocabulary of {self._card.vocab_size}", param=path
            )

    def _check_choices(self, n: int, num_prompts: int) -> None:
        bound = self._config.max_choices
        if n * num_prompts > bound:
            param = "n" if num_prompts == 1 else "prompt"
            raise InvalidRequest(f"{param}: n × prompts is {n * num_prompts}, over the limit of {bound}", param=param)

    def _max_tokens(self, num_prompt: int, prompt_field: str, max_tokens: int | None, max_tokens_field: str) -> int:
        """What is asked for, or what is left of the context."""
        context = self._card.max_model_len
        if num_prompt >= context:
            raise ContextTooLong(
                f"{prompt_field}: the prompt has {num_prompt} tokens, which leaves no room in the model's context "
                f"of {context}",
                param=prompt_field,
            )
        if max_tokens is None:
            return context - num_prompt
        if num_prompt + max_tokens > context:
            raise ContextTooLong(
                f"{max_tokens_field}: {num_prompt} prompt tokens and {max_tokens} to generate exceed the model's "
                f"context of {context}",
                param=max_tokens_field,
            )
        return max_tokens


def _chat_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    if not messages:
        raise InvalidRequest("messages: must not be empty", param="messages")
    chat = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": text_of(message, f"messages[{i}]")})
    return chat


def _check_stop(stop: Sequence[str]) -> None:
    _at_most("stop", len(stop), MAX_STOP_STRINGS)
    for i, text in enumerate(stop):
        path = f"stop[{i}]"
        if not text:
            raise InvalidRequest(f"{path}: must not be empty", param=path)
        if len(text) > MAX_STOP_STRING_CHARS:
            raise InvalidRequest(f"{path}: at most {MAX_STOP_STRING_CHARS} characters", param=path)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _between(path: str, value: Any, low: float, high: float) -> Any:
    if not low <= value <= high:
        raise InvalidRequest(f"{path}: must be between {low} and {high}, got {value}", param=path)
    return value


def _at_most(path: str, count: int, bound: int) -> None:
    if count > bound:
        raise InvalidRequest(f"{path}: at most {bound} entries, got {count}", param=path)
