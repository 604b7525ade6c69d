"""What came of serving a trace one way: who was answered in time, how long it took, what it cost. Numbers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import Any

from cluster.simulation.fleet.coordinator import Sequence

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Objective:
    """What an answer has to be, to count."""

    first_token_s: float
    token_s: float  # each later one, on average over the answer
    warm_up_s: float = 0.0  # those who arrive before are not counted

    def is_met(self, sequence: Sequence) -> bool:
        """By an answer that is whole."""
        return (
            sequence.state == "finished"
            and first_token_s(sequence) <= self.first_token_s
            and token_s(sequence) <= self.token_s
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment."""

    at_s: float
    coordinators: int
    shards: tuple[int, ...]
    gpus: float
    running: int
    waiting: int


def first_token_s(sequence: Sequence) -> float:
    """From the request's arrival."""
    return sequence.first_token_s - sequence.arrival.at_s


def token_s(sequence: Sequence) -> float:
    """Of each after the first; 0 where there is none."""
    later = sequence.arrival.output_tokens - 1
    return (sequence.finished_s - sequence.first_token_s) / later if later else 0.0


def quantile(ordered: Sequences[float], part: float) -> float | None:
    """By rank; None of nothing."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(part * len(ordered)) - 1))] if ordered else None


@dataclass
class Outcome:
    """Of one variant."""

    name: str
    shard_names: tuple[str, ...]
    samples: list[Sample] = field(default_factory=list)
    gpu_s_of_coordinators: float = 0.0
    gpu_s_of_shards: float = 0.0
    machine_s: float = 0.0  # of CPUs with experts
    peak_gpus: float = 0.0
    seconds: float = 0.0
    sequences: Sequences[Sequence] = ()

    def hold(self, of_coordinators: float, of_shards: float, machines: int, seconds: float) -> None:
        """GPUs that are taken for so long."""
        self.gpu_s_of_coordinators += of_coordinators * seconds
        self.gpu_s_of_shards += of_shards * seconds
        self.machine_s += machines * seconds
        self.peak_gpus = max(self.peak_gpus, of_coordinators + of_shards)
        self.seconds += seconds

    def end(self, sequences: Sequences[Sequence]) -> None:
        """Nothing comes any more."""
        self.sequences = sequences

    @property
    def gpu_hours(self) -> float:
        """That were held."""
        return (self.gpu_s_of_coordinators + self.gpu_s_of_shards) / HOUR_S

    def document(self, objective: Objective) -> dict[str, Any]:
        """As JSON: seconds, hours and tokens."""
        counted = [one for one in self.sequences if one.arrival.at_s >= objective.warm_up_s]
        good = [one for one in counted if objective.is_met(one)]
        finished = [one for one in counted if one.state == "finished"]
        states = Counter(one.state for one in counted)
        good_tokens = sum(one.arrival.output_tokens for one in good)
        all_good_tokens = sum(one.arrival.output_tokens for one in self.sequences if objective.is_met(one))
        firsts, tokens = sorted(map(first_token_s, finished)), sorted(map(token_s, finished))
        seconds = max(1e-9, self.seconds - objective.warm_up_s)
        return {
            "variant": self.name,
            "requests": len(counted),
            "finished": states["finished"],
            "shed": states["shed"],
            "failed": states["failed"],
            "good": len(good),
            "good_share": len(good) / len(counted) if counted else None,
            "goodput_tokens_per_s": good_tokens / seconds if counted else None,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_of_coordinators": self.gpu_s_of_coordinators / HOUR_S,
            "gpu_hours_of_shards": self.gpu_s_of_shards / HOUR_S,
            "cpu_machine_hours": self.machine_s / HOUR_S,
            "peak_gpus": self.peak_gpus,
            "gpu_hours_if_fixed_at_peak": self.peak_gpus * self.seconds / HOUR_S,
            "gpu_s_per_1000_good_tokens": 1e6 * self.gpu_hours * 3.6 / all_good_tokens if all_good_tokens else None,
            "first_token_s": {"p50": quantile(firsts, 0.5), "p99": quantile(firsts, 0.99)},
            "token_s": {"p50": quantile(tokens, 0.5), "p99": quantile(tokens, 0.99)},
            "shards": list(self.shard_names),
            "over_time": [
                {
                    "at_s": one.at_s,
                    "coordinators": one.coordinators,
                    "replicas": list(one.shards),
                    "gpus": one.gpus,
                    "running": one.running,
                    "waiting": one.waiting,
                }
                for one in self.samples
            ],
        }
