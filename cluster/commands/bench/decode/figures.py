"""The figures of `manta bench decode`: runs, medians, bytes and the memory floor. Plain arithmetic; runs nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from cluster.checkpoint.architecture import Architecture, coordinator_tensors, expert_tensors

FIRST_ID = 5  # the ids below are control tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences that start together, each with a prompt and a forced length."""

    num_sequences: int
    prompt_tokens: int
    output_tokens: int

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

    @property
    def step_ms(self) -> float:
        """Mean over the decode steps."""
        return 1e3 * self.decode_s / self.decode_steps if self.decode_steps else math.nan


@dataclass(frozen=True, slots=True)
class Rival:
    """What transformers did in the same pairs."""

    runs: tuple[Run, ...]
    experts: str  # its implementation, the fastest of a short calibration
    attention: str


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One batch size."""

    workload: Workload
    runs: tuple[Run, ...]
    bytes_per_step: float  # of weights that a step has to read, mean over the steps
    bandwidth: float  # bytes a second
    rival: Rival | None = None

    def to_json(self) -> dict[str, Any]:
        step_ms = _median_ms(self.runs)
        floor_ms = 1e3 * self.bytes_per_step / self.bandwidth
        result: dict[str, Any] = {
            "batch": self.workload.num_sequences,
            "prompt_tokens": self.workload.prompt_tokens,
            "output_tokens": self.workload.output_tokens,
            "ms_per_step": round(step_ms, 3),
            "tokens_per_s": round(1e3 * self.workload.num_sequences / step_ms, 2),
            "bytes_per_step": round(self.bytes_per_step),
            "floor_ms": round(floor_ms, 3),
            "floor_fraction": round(floor_ms / step_ms, 3),
            "ms_per_step_of_runs": [round(run.step_ms, 3) for run in self.runs],
        }
        if self.rival is not None:
            theirs = _median_ms(self.rival.runs)
            result |= {
                "transformers_ms_per_step": round(theirs, 3),
                "transformers_tokens_per_s": round(1e3 * self.workload.num_sequences / theirs, 2),
                "transformers_ms_per_step_of_runs": [round(run.step_ms, 3) for run in self.rival.runs],
                "transformers_experts": self.rival.experts,
                "transformers_attention": self.rival.attention,
                "speedup": round(theirs / step_ms, 3),
                "equal_tokens": round(equal_share(self.runs[-1].token_ids, self.rival.runs[-1].token_ids), 3),
            }
        return result


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """One set of prompts, until each has its first token."""

    workload: Workload
    runs: tuple[Run, ...]
    rival: Rival | None = None

    def to_json(self) -> dict[str, Any]:
        tokens = self.workload.num_sequences * self.workload.prompt_tokens
        ms = 1e3 * median(run.prefill_s for run in self.runs)
        result: dict[str, Any] = {
            "sequences": self.workload.num_sequences,
            "prompt_tokens": self.workload.prompt_tokens,
            "ms": round(ms, 2),
            "tokens_per_s": round(1e3 * tokens / ms, 1),
            "ms_of_runs": [round(1e3 * run.prefill_s, 2) for run in self.runs],
        }
        if self.rival is not None:
            theirs = 1e3 * median(run.prefill_s for run in self.rival.runs)
            result |= {
                "transformers_ms": round(theirs, 2),
                "transformers_ms_of_runs": [round(1e3 * run.prefill_s, 2) for run in self.rival.runs],
                "transformers_experts": self.rival.experts,
                "transformers_attention": self.rival.attention,
                "speedup": round(theirs / ms, 3),
            }
        return result


def bytes_per_step(architecture: Architecture, dtype_bytes: int, num_rows: int, expert_reads: float) -> float:
    """Bytes of weights that a step of `num_rows` reads once: `expert_reads` is (expert, layer) pairs with a row.

    Of the embeddings only the rows that are looked up, unless they are the output head too.
    """
    a = architecture
    attention = sum(math.prod(shape) for shape in coordinator_tensors(a).values())
    if not a.tie_word_embeddings:
        attention -= (a.vocab_size - min(num_rows, a.vocab_size)) * a.hidden_size
    expert = sum(math.prod(shape) for shape in expert_tensors(a, 0, 0).values())
    return dtype_bytes * (attention + expert_reads * expert)


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How much of the outputs is the same up to the first difference: in bf16 other batch shapes round differently."""

    def share(a: Sequence[int], b: Sequence[int]) -> float:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return same / max(len(a), len(b), 1)

    return fmean(share(a, b) for a, b in zip(ours, theirs, strict=True))


def _median_ms(runs: Sequence[Run]) -> float:
    return median(run.step_ms for run in runs)
