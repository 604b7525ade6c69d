"""Builds requests and sequences for tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from cluster.messages import Request, SamplingParams
from router_service.scheduling.sequence import Sequence

_numbers = itertools.count()


def make_request(prompt: Iterable[int], *, output: Iterable[int] = (), seed: int = 0, **fields: Any) -> Request:
    """A greedy request of its own id; `fields` are those of Request or of SamplingParams."""
    request_id = fields.pop("request_id", f"request-{next(_numbers)}")
    of_request = {
        name: fields.pop(name)
        for name in ("choice_index", "deadline", "cache_salt", "grammar", "pooling", "priority", "num_siblings")
        if name in fields
    }
    sampling = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **fields})
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(output),
        sampling=sampling,
        seed=seed,
        **of_request,
    )


def make_sequence(prompt: Iterable[int], **fields: Any) -> Sequence:
    """A sequence of such a request."""
    return Sequence(make_request(prompt, **fields))
