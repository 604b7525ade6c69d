"""The bounds of every sampling field, and the model's defaults. Knows fields; knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.errors import InvalidRequest
from cluster.messages import MIN_REPETITION_PENALTY, ModelCard
from gateway.request.protocol import SamplingFields

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRING_CHARS = 256


def sampling_options(body: SamplingFields, card: ModelCard, max_choices: int) -> dict[str, Any]:
    """SamplingParams' fields other than max_tokens and logprobs. Raises InvalidRequest for the first that is wrong."""
    defaults = card.defaults
    temperature = between("temperature", _default(body.temperature, defaults.temperature), 0, 2)
    top_p = between("top_p", _default(body.top_p, defaults.top_p), 0, 1)
    if top_p == 0:  # leaves the most likely token, as temperature 0 does
        temperature, top_p = 0, 1
    repetition_penalty = _default(body.repetition_penalty, defaults.repetition_penalty)
    between("repetition_penalty", repetition_penalty, MIN_REPETITION_PENALTY, 10)
    if body.prompt_logprobs is not None:
        between("prompt_logprobs", body.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
    if body.n is not None:
        between("n", body.n, 1, max_choices)
    read_priority(body.priority)
    for name, seed in (("seed", body.seed), ("random_seed", body.random_seed)):
        if seed is not None:
            between(name, seed, -(2**63), 2**63 - 1)
    stop_token_ids = body.stop_token_ids or []
    for i, token_id in enumerate(stop_token_ids):
        check_token_id(token_id, card, f"stop_token_ids[{i}]")
    _check_stop(body.stop or [])
    return {
        "min_tokens": between("min_tokens", _default(body.min_tokens, 0), 0, card.max_model_len),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "top_k": max(0, between("top_k", _default(body.top_k, defaults.top_k), -1, 2**31 - 1)),
        "min_p": float(between("min_p", _default(body.min_p, defaults.min_p), 0, 1)),
        "repetition_penalty": float(repetition_penalty),
        "presence_penalty": float(between("presence_penalty", _default(body.presence_penalty, 0.0), -2, 2)),
        "frequency_penalty": float(between("frequency_penalty", _default(body.frequency_penalty, 0.0), -2, 2)),
        "logit_bias": _logit_bias(body.logit_bias or {}, card),
        "stop_token_ids": tuple(stop_token_ids),
        "ignore_eos": bool(body.ignore_eos),
        "routed_experts": bool(body.return_routed_experts),
    }


def read_priority(priority: int | None) -> int:
    """0 unless said. Raises InvalidRequest."""
    return 0 if priority is None else int(between("priority", priority, -(2**31), 2**31 - 1))


def check_token_id(token_id: int, card: ModelCard, path: str) -> None:
    """Raises InvalidRequest."""
    if not 0 <= token_id < card.vocab_size:
        raise InvalidRequest(f"{path}: token id {token_id} is not in the vocabulary of {card.vocab_size}", param=path)


def between(path: str, value: Any, low: float, high: float) -> Any:
    """The value. Raises InvalidRequest."""
    if not low <= value <= high:
        raise InvalidRequest(f"{path}: must be between {low} and {high}, got {value}", param=path)
    return value


def _logit_bias(logit_bias: dict[str, float], card: ModelCard) -> tuple[tuple[int, float], ...]:
    pairs = {}
    for key, bias in logit_bias.items():
        path = f"logit_bias.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidRequest(f"{path}: the key must be a token id", param=path)
        check_token_id(int(key), card, path)
        pairs[int(key)] = float(between(path, bias, -100, 100))
    return tuple(sorted(pairs.items()))


def _check_stop(stop: Sequence[str]) -> None:
    for i, text in enumerate(stop):
        path = f"stop[{i}]"
        if len(text) > MAX_STOP_STRING_CHARS:
            raise InvalidRequest(f"{path}: at most {MAX_STOP_STRING_CHARS} characters", param=path)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
