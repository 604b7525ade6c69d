"""The figures of one coordinator as Prometheus families, made from the engine's own counts when someone asks.

Names are vLLM's where the meaning is the same. Nothing here runs while tokens are made, but for one observation a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cluster.messages import EngineStats
from cluster.planning.placement import ExpertGroup
from cluster.telemetry.kernels import ProcessKernels, kernels_family
from cluster.telemetry.loop_watch import LoopWatch
from cluster.telemetry.metrics import DispatchCounts, ProcessFigures
from router_service.scheduling.scheduler import Batch

STEP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
REQUEST_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class StepHistograms:
    """How long steps take, and how many tokens they compute; the engine calls it once a step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._longest_s = 0.0
        self._longest = Gauge("manta_longest_step_seconds", "Longest step since the start.", registry=registry)
        self._seconds = Histogram("manta_step_seconds", "Time of one step.", buckets=STEP_BUCKETS_S, registry=registry)
        self._tokens = Histogram(
            "vllm:iteration_tokens_total", "Tokens of one step.", buckets=STEP_TOKEN_BUCKETS, registry=registry
        )

    def __call__(self, seconds: float, num_tokens: int) -> None:
        if seconds > self._longest_s:
            self._longest_s = seconds
            self._longest.set(seconds)
        self._seconds.observe(seconds)
        self._tokens.observe(num_tokens)


class RequestHistograms:
    """Where the time of complete answers went, as vLLM cuts it: waiting, prompt, tokens after the first."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, documentation: str) -> Histogram:
            return Histogram(name, documentation, buckets=REQUEST_BUCKETS_S, registry=registry)

        self._queue = histogram("vllm:request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.")
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.")
        self._inference = histogram("vllm:request_inference_time_seconds", "From the first step to the last token.")

    def __call__(self, batch: Batch) -> None:
        """Those whose last step it was; called at its end."""
        now = time.perf_counter()
        for scheduled in batch:
            sequence = scheduled.sequence
            if sequence.finish_reason is None or sequence.scheduled_at is None or sequence.first_token_at is None:
                continue
            self._queue.observe(sequence.queue_s)
            self._prefill.observe(sequence.first_token_at - sequence.scheduled_at)
            self._decode.observe(now - sequence.first_token_at)
            self._inference.observe(now - sequence.scheduled_at)


class EngineMetrics(Collector):
    """The registry of a coordinator's process."""

    def __init__(
        self,
        replica: str,
        groups: Sequence[ExpertGroup],
        dispatch_latency: Mapping[int, DispatchCounts],
    ) -> None:
        """`dispatch_latency` by group; counts that go on while this looks at them."""
        self._replica = replica
        self._groups = tuple(groups)
        self._dispatch_latency = dispatch_latency
        self._stats: Callable[[], EngineStats] | None = None
        self._cache: dict[str, object] = {}
        self._kernels: ProcessKernels | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self.loop = LoopWatch(self._registry)
        self.observe_step = StepHistograms(self._registry)
        self.observe_requests = RequestHistograms(self._registry)

    def watch(self, stats: Callable[[], EngineStats], cache: Mapping[str, object], kernels: ProcessKernels) -> None:
        """From now on these are the engine's figures; `cache` is how its KV cache is set up."""
        self._kernels = kernels
        self._stats = stats
        self._cache = dict(cache)

    def figures(self) -> ProcessFigures:
        return ProcessFigures(self._replica, tuple(self._registry.collect()))

    def collect(self) -> Iterable[Metric]:
        if self._stats is not None:
            stats = self._stats()
            yield from engine_families(stats)
            yield cache_family(self._cache)
            if self._kernels is not None:
                yield kernels_family(self._kernels)
            yield from expert_families(self._groups, stats.rows_per_expert, self._dispatch_latency)


def engine_families(stats: EngineStats) -> Iterable[Metric]:
    """Queue, cache and token counts."""
    yield _gauge("vllm:num_requests_running", "Requests in the running batch.", stats.num_requests_running)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait for their turn.", stats.num_requests_waiting)
    used = stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0
    yield _gauge("vllm:kv_cache_usage_perc", "Part of the KV cache that running requests hold; 1 is all.", used)
    yield _counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens_total)
    yield _counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens_total)
    yield _counter("manta_failed_steps", "Steps that ended a request with an error.", stats.failed_steps_total)
    yield _counter("vllm:num_preemptions", "Requests that gave their blocks back.", stats.preemptions_total)
    yield _counter(
        "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_query_tokens_total
    )
    yield _counter("vllm:prefix_cache_hits", "Tokens found in it.", stats.prefix_cache_hit_tokens_total)


def cache_family(cache: Mapping[str, object]) -> Metric:
    """How the KV cache is set up, in labels."""
    family = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is set up; always 1.", labels=list(cache))
    family.add_metric([str(value) for value in cache.values()], 1)
    return family


def expert_families(
    groups: Sequence[ExpertGroup], rows: Sequence[int], latency: Mapping[int, DispatchCounts]
) -> Iterable[Metric]:
    """Rows sent to each expert, how unequal they are, and how long answers took to come; nothing for a dense model."""
    if not rows:
        return
    sent = CounterMetricFamily(
        "manta_expert_rows", "Rows sent to each expert, summed over layers.", labels=["group", "expert"]
    )
    for group in groups:
        for expert in group.experts:
            sent.add_metric([str(group.index), str(expert)], rows[expert])
    yield sent
    total = sum(rows)
    yield _gauge(
        "manta_expert_imbalance",
        "Rows of the busiest expert by the mean of all, since the start; 1 is balanced.",
        max(rows) * len(rows) / total if total else 1.0,
    )
    dispatch = HistogramMetricFamily(
        "manta_dispatch_seconds", "From sending a layer's rows to a group until its answer is read.", labels=["group"]
    )
    hedges = CounterMetricFamily(
        "manta_dispatch_hedges", "Dispatches asked of a second replica, as the first was slow.", labels=["group"]
    )
    for index, counts in latency.items():
        counts.add_to(dispatch, [str(index)])
        hedges.add_metric([str(index)], counts.hedges)
    yield dispatch
    yield hedges


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(name, documentation, value=value)
