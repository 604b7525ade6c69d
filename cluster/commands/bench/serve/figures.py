"""The figures of `manta bench serve`: percentiles, throughput and goodput of finished requests. Plain arithmetic.

TTFT   from when a request was due until its first token
TPOT   mean time per later token of one request
ITL    each gap between two pieces of a stream, whatever number of tokens they carry
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request has to keep to count as goodput."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_set(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None

    def is_met(self, outcome: Outcome) -> bool:
        """A failed request meets nothing."""
        if outcome.error is not None:
            return False
        return (self.ttft_ms is None or outcome.ttft_ms <= self.ttft_ms) and (
            self.tpot_ms is None or (outcome.tpot_ms or 0.0) <= self.tpot_ms
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, with times in seconds since the load began. Without an error it has at least one token."""

    due_s: float  # when it was to be sent; when it was, with a fixed concurrency
    end_s: float
    token_times_s: tuple[float, ...] = ()  # of each piece that carried tokens
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None  # its kind
    detail: str = ""

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.token_times_s[0] - self.due_s)

    @property
    def tpot_ms(self) -> float | None:
        """None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return 1e3 * (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (b - a) for a, b in pairwise(self.token_times_s)]

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"due_s": round(self.due_s, 4), "end_s": round(self.end_s, 4)}
        if self.error is not None:
            return document | {"error": self.error, "detail": self.detail}
        return document | {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": None if self.tpot_ms is None else round(self.tpot_ms, 3),
            "itl_ms": [round(gap, 3) for gap in self.gaps_ms],
        }


def percentile(values: Sequence[float], quantile: float) -> float:
    """Linear between the two nearest, as numpy's default. `values` is not empty."""
    ordered = sorted(values)
    place = quantile * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 and the largest. Empty for no values."""
    if not values:
        return {}
    figures = {"mean": fmean(values)} | {f"p{100 * q:g}": percentile(values, q) for q in QUANTILES}
    return {name: round(value, 3) for name, value in (figures | {"max": max(values)}).items()}


def goodput(outcomes: Sequence[Outcome], slo: Slo, duration_s: float) -> float:
    """Requests a second that met the objective."""
    return sum(map(slo.is_met, outcomes)) / duration_s


def duration(outcomes: Sequence[Outcome]) -> float:
    """From when the first was due until the last ended."""
    return max(max(o.end_s for o in outcomes) - min(o.due_s for o in outcomes), 1e-9)


def report(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """The figures of the JSON line."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    seconds = duration(outcomes)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    document: dict[str, Any] = {
        "duration_s": round(seconds, 3),
        "requests": len(outcomes),
        "errors": errors.total(),
        "errors_by_kind": dict(errors.most_common()),
        "ttft_ms": summary([o.ttft_ms for o in answered]),
        "tpot_ms": summary([o.tpot_ms for o in answered if o.tpot_ms is not None]),
        "itl_ms": summary([gap for o in answered for gap in o.gaps_ms]),
        "latency_ms": summary([1e3 * (o.end_s - o.due_s) for o in answered]),
        "prompt_tokens": sum(o.prompt_tokens for o in answered),
        "output_tokens": sum(o.output_tokens for o in answered),
        "requests_per_s": round(len(answered) / seconds, 3),
        "output_tokens_per_s": round(sum(o.output_tokens for o in answered) / seconds, 2),
    }
    if slo.is_set():
        document |= {
            "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
            "goodput_requests_per_s": round(goodput(outcomes, slo, seconds), 3),
            "slo_attainment": round(sum(map(slo.is_met, outcomes)) / len(outcomes), 3),
        }
    return document
