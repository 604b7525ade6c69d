"""The figures of `manta bench decode`: runs, medians, bytes and the memory floor. Plain arithmetic; runs nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cluster.checkpoint.architecture import Architecture
from cluster.planning.placement import WeightBytes

FIRST_ID = 5  # the ids below are control tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences that start together, each with a prompt and a forced length."""

    num_sequences: int
    prompt_tokens: int
    output_tokens: int
    context: int = 0  # of the prompt's tokens, so many are in the KV cache before anything runs

    @classmethod
    def after_context(cls, num_sequences: int, context: int, output_tokens: int) -> Workload:
        """Sequences whose prompt is in the cache but for its last token, which somebody has to compute."""
        return cls(num_sequences, context + 1, output_tokens, context)

    @property
    def num_tokens(self) -> int:
        """Of each sequence at its end."""
        return self.prompt_tokens + self.output_tokens

    def __str__(self) -> str:
        return f"{self.num_sequences} × {self.context or self.prompt_tokens}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, the same in every run."""
        source = random.Random(0)
        ids = range(min(FIRST_ID, vocab_size - 1), vocab_size)
        return [source.choices(ids, k=self.prompt_tokens) for _ in range(self.num_sequences)]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload. A step counts as decode when every sequence got a token and none its first."""

    prefill_s: float  # until every sequence has its first token
    decode_s: float
    decode_steps: int
    token_ids: list[list[int]]  # of each sequence
    peak_bytes: int | None = None  # resident in the process that ran it, where that can be told
    grown_bytes: int | None = None  # of these, what was not there before

    @property
    def step_ms(self) -> float:
        """Mean over the decode steps, of which there is at least one."""
        return 1e3 * self.decode_s / self.decode_steps


@dataclass(frozen=True, slots=True)
class Loading:
    """What one engine took before its first step."""

    weights: str
    seconds: float
    resident_bytes: int  # of weights, mostly: nobody has touched the cache yet

    def __str__(self) -> str:
        return f"{self.weights} {self.seconds:.1f} s, {self.resident_bytes / 1e6:.0f} MB"

    def to_json(self) -> dict[str, Any]:
        """Rounded."""
        return {"weights": self.weights, "s": round(self.seconds, 2), "resident_bytes": self.resident_bytes}


@dataclass(frozen=True, slots=True)
class Rival:
    """What another engine did in the same pairs."""

    name: str
    runs: tuple[Run, ...]
    implementation: str  # which of its ways was fastest in a short calibration

    def to_json(self) -> dict[str, Any]:
        """Without figures."""
        return {"name": self.name, "implementation": self.implementation}


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One batch size and length."""

    workload: Workload
    runs: tuple[Run, ...]
    weight_bytes: float  # that a step has to read, mean over the steps
    kv_bytes: float  # the same, of keys and values
    bandwidth: float  # bytes a second
    rivals: tuple[Rival, ...] = ()
    weights: str = "bfloat16"  # what they are stored as, and what else tells engines apart
    equal_tokens: float = 1.0  # of those that the first engine chose

    def to_json(self) -> dict[str, Any]:
        step_ms = _median_ms(self.runs)
        bytes_per_step = self.weight_bytes + self.kv_bytes
        floor_ms = 1e3 * bytes_per_step / self.bandwidth
        return {
            "weights": self.weights,
            "batch": self.workload.num_sequences,
            "prompt_tokens": self.workload.prompt_tokens,
            "context": self.workload.context,
            "output_tokens": self.workload.output_tokens,
            "ms_per_step": round(step_ms, 3),
            "tokens_per_s": round(1e3 * self.workload.num_sequences / step_ms, 2),
            "bytes_per_step": round(bytes_per_step),
            "kv_bytes_per_step": round(self.kv_bytes),
            "floor_ms": round(floor_ms, 3),
            "floor_fraction": round(floor_ms / step_ms, 3),
            "ms_per_step_of_runs": [round(run.step_ms, 3) for run in self.runs],
            "equal_tokens": round(self.equal_tokens, 3),
            "rivals": [self._against(rival, step_ms) for rival in self.rivals],
        }

    def _against(self, rival: Rival, step_ms: float) -> dict[str, Any]:
        theirs = _median_ms(rival.runs)
        figures = rival.to_json() | {
            "ms_per_step": round(theirs, 3),
            "tokens_per_s": round(1e3 * self.workload.num_sequences / theirs, 2),
            "ms_per_step_of_runs": [round(run.step_ms, 3) for run in rival.runs],
            "speedup": round(theirs / step_ms, 3),
        }
        if not self.workload.context:  # else each has random numbers of its own in its cache
            figures["equal_tokens"] = round(equal_share(self.runs[-1].token_ids, rival.runs[-1].token_ids), 3)
        return figures


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """One set of prompts, until each has its first token."""

    workload: Workload
    runs: tuple[Run, ...]
    weight_bytes: int  # in the engine's process
    kv_bytes: int  # of these prompts
    rivals: tuple[Rival, ...] = ()
    weights: str = "bfloat16"

    def to_json(self) -> dict[str, Any]:
        tokens = self.workload.num_sequences * self.workload.prompt_tokens
        ms = _median_prefill_ms(self.runs)
        return {
            "weights": self.weights,
            "sequences": self.workload.num_sequences,
            "prompt_tokens": self.workload.prompt_tokens,
            "ms": round(ms, 2),
            "tokens_per_s": round(1e3 * tokens / ms, 1),
            "ms_of_runs": [round(1e3 * run.prefill_s, 2) for run in self.runs],
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_bytes,
            **_memory(self.runs),
            "rivals": [
                rival.to_json()
                | {
                    "ms": round(_median_prefill_ms(rival.runs), 2),
                    "ms_of_runs": [round(1e3 * run.prefill_s, 2) for run in rival.runs],
                    "speedup": round(_median_prefill_ms(rival.runs) / ms, 3),
                    **_memory(rival.runs),
                }
                for rival in self.rivals
            ],
        }


def kv_bytes_per_step(workload: Workload, bytes_of_token: int, sliding_window: int | None) -> float:
    """Of keys and values that a decode step reads once, mean over the steps."""
    lengths = range(workload.prompt_tokens + 1, workload.num_tokens)  # the new token's own are read as well
    seen = fmean(min(length, sliding_window or length) for length in lengths)
    return workload.num_sequences * bytes_of_token * seen


def weight_bytes_per_step(
    architecture: Architecture, held: WeightBytes, dtype_bytes: int, num_rows: int, expert_reads: float
) -> float:
    """Bytes of weights that a step of `num_rows` reads once: `expert_reads` is (expert, layer) pairs with a row.

    Of the embeddings only the rows that are looked up, unless they are the output head too.
    """
    a = architecture
    coordinator = held.coordinator
    if not a.tie_word_embeddings:
        coordinator -= dtype_bytes * (a.vocab_size - min(num_rows, a.vocab_size)) * a.hidden_size
    return coordinator + expert_reads * held.expert / max(1, a.num_expert_layers)


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How much of the outputs is the same up to the first difference: in bf16 other batch shapes round differently."""

    def share(a: Sequence[int], b: Sequence[int]) -> float:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return same / max(len(a), len(b), 1)

    return fmean(share(a, b) for a, b in zip(ours, theirs, strict=True))


def _median_ms(runs: Sequence[Run]) -> float:
    return median(run.step_ms for run in runs)


def _median_prefill_ms(runs: Sequence[Run]) -> float:
    return 1e3 * median(run.prefill_s for run in runs)


def _memory(runs: Sequence[Run]) -> dict[str, int | None]:
    """The most of all runs."""
    return {
        "peak_bytes": max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        "grown_bytes": max((run.grown_bytes for run in runs if run.grown_bytes is not None), default=None),
    }
