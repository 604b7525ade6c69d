"""How busy a model and each of its experts is, from two samples of what its processes counted. Plain data, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import Metric

Key = tuple[str, str, str]  # figure, group, expert; empty where the figure has none


@dataclass(frozen=True, slots=True)
class LoadSample:
    """The figures of one model's processes at one moment, each summed over replicas."""

    model: str
    at_s: float  # on a monotonic clock
    figures: dict[Key, float] = field(default_factory=dict)
    num_replicas: dict[str, int] = field(default_factory=dict)  # that answered: shards by group, coordinators by ""

    @classmethod
    def of(cls, model: str, at_s: float, processes: Iterable[Sequence[Metric]]) -> LoadSample:
        sample = cls(model, at_s)
        for families in processes:
            for metric in families:
                for name, labels, value, *_ in metric.samples:
                    group = labels.get("group", "")
                    key = (name, group, labels.get("expert", ""))
                    sample.figures[key] = sample.figures.get(key, 0.0) + value
                    if name in ("manta_shard_busy_fraction", "vllm:kv_cache_usage_perc"):
                        sample.num_replicas[group] = sample.num_replicas.get(group, 0) + 1
        return sample

    def of_model(self, name: str) -> float:
        """A figure without group; 0 when no process told it."""
        return self.figures.get((name, "", ""), 0.0)


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One expert. Queue and busy fraction are its group's; None where no shard told them."""

    expert: int
    group: int
    rows_per_s: float
    rows: int  # since the start
    busy_fraction: float | None
    queue_s: float | None  # mean wait of a dispatch


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model between two samples."""

    model: str
    running: int
    waiting: int
    kv_usage: float  # 1 is full; of all coordinators together
    prompt_tokens_per_s: float
    tokens_per_s: float
    experts: tuple[ExpertLoad, ...]


def load_between(before: LoadSample, after: LoadSample) -> ModelLoad:
    """Rates over the time between; all zero when both are one sample. A counter that went back began anew."""
    seconds = after.at_s - before.at_s

    def increase(key: Key) -> float:
        return max(0.0, after.figures.get(key, 0.0) - before.figures.get(key, 0.0))

    def rate(key: Key) -> float:
        return increase(key) / seconds if seconds > 0 else 0.0

    experts = []
    for key, rows in after.figures.items():
        name, group, expert = key
        if name != "manta_expert_rows_total":
            continue
        replicas = after.num_replicas.get(group)
        frames = increase(("manta_shard_frames_total", group, ""))
        queue_s = increase(("manta_shard_queue_seconds_total", group, "")) / frames if frames else 0.0
        busy = after.figures.get(("manta_shard_busy_fraction", group, ""), 0.0)
        experts.append(
            ExpertLoad(
                expert=int(expert),
                group=int(group),
                rows_per_s=rate(key),
                rows=int(rows),
                busy_fraction=busy / replicas if replicas else None,
                queue_s=queue_s if replicas else None,
            )
        )
    return ModelLoad(
        model=after.model,
        running=int(after.of_model("vllm:num_requests_running")),
        waiting=int(after.of_model("vllm:num_requests_waiting")),
        kv_usage=after.of_model("vllm:kv_cache_usage_perc") / max(1, after.num_replicas.get("", 0)),
        prompt_tokens_per_s=rate(("vllm:prompt_tokens_total", "", "")),
        tokens_per_s=rate(("vllm:generation_tokens_total", "", "")),
        experts=tuple(sorted(experts, key=lambda one: one.expert)),
    )
