"""What one gateway process counts of its requests. Knows models, tokens and seconds; knows no wire and no coordinator.

Names are vLLM's where the meaning is the same. Histograms are fed once per chunk of tokens, never per token.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from cluster.errors import MantaError, RequestCancelled
from cluster.telemetry.loop_watch import LoopWatch
from cluster.telemetry.metrics import ProcessFigures

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 60.0)
LONG_SECONDS = (0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)


CHOICES = (1, 2, 5, 10, 20, 50, 100, 200)


class GatewayMetrics:
    """The registry of a gateway process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        self.loop = LoopWatch(registry)

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, documentation, ["model"], buckets=buckets, registry=registry)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "From admission to the first tokens.", SECONDS
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Time per token, one observation per chunk of tokens.", SECONDS
        )
        self.e2e_request_latency = histogram(
            "vllm:e2e_request_latency_seconds", "From admission to the end of a complete answer.", LONG_SECONDS
        )
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a complete request.", TOKENS)
        self.generated_tokens = histogram("vllm:request_generation_tokens", "Tokens of a complete answer.", TOKENS)
        self.params_n = histogram("vllm:request_params_n", "`n` of a complete request.", CHOICES)
        self.params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "`max_tokens` of a complete request, or the room that it had.", TOKENS
        )
        self.success = Counter(
            "vllm:request_success", "Complete answers, per choice.", ["model", "finished_reason"], registry=registry
        )
        self.failures = Counter(
            "manta_request_failures",
            "Requests without a complete answer, at either door, by why.",
            ["model", "error", "reason"],
            registry=registry,
        )
        self.ongoing = Gauge("manta_requests_ongoing", "Requests in this gateway now.", ["model"], registry=registry)
        self.scrape_failures = Counter(
            "manta_scrape_failures",
            "Processes that did not tell their figures in time.",
            ["model", "deployment"],
            registry=registry,
        )

    def figures(self, replica: str) -> ProcessFigures:
        return ProcessFigures(replica, tuple(self.registry.collect()))


class RequestTimer:
    """Times one request, from admission to its end, and counts it."""

    def __init__(self, metrics: GatewayMetrics, model: str, num_choices: int) -> None:
        self._metrics = metrics
        self._model = model
        self._waiting = num_choices
        self._inter_token = metrics.inter_token_latency.labels(model)
        self._last: dict[int, float] = {}  # by choice: when it last got tokens
        self._ongoing = metrics.ongoing.labels(model)
        self.started = time.monotonic()
        self.time_to_first_token_s: float | None = None
        self.finish_reasons: list[str] = []
        self.asked: tuple[int, int] | None = None  # `n` and `max_tokens`, of a request that generates
        self._ongoing.inc()

    def tokens(self, choice: int, count: int, finish_reason: str | None) -> None:
        """`count` new tokens of one choice; its last call has a `finish_reason`."""
        now = time.monotonic()
        if self.time_to_first_token_s is None:
            self.time_to_first_token_s = now - self.started
            self._metrics.time_to_first_token.labels(self._model).observe(self.time_to_first_token_s)
        last = self._last.get(choice)
        if last is not None and count:
            self._inter_token.observe((now - last) / count)
        self._last[choice] = now
        if finish_reason is not None:
            self._waiting -= 1
            self.finish_reasons.append(finish_reason)
            self._metrics.success.labels(self._model, finish_reason).inc()

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return self._waiting == 0

    def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Whatever became of it. Failures are counted at the doors, where those are known that came no further."""
        self._ongoing.dec()
        if self.is_complete:
            self._metrics.e2e_request_latency.labels(self._model).observe(time.monotonic() - self.started)
            self._metrics.prompt_tokens.labels(self._model).observe(prompt_tokens)
            self._metrics.generated_tokens.labels(self._model).observe(completion_tokens)
            if self.asked is not None:
                n, max_tokens = self.asked
                self._metrics.params_n.labels(self._model).observe(n)
                self._metrics.params_max_tokens.labels(self._model).observe(max_tokens)


def error_name(error: BaseException | None) -> str:
    """What a failure is called in figures and logs: our own errors by their class, all others as one."""
    if isinstance(error, MantaError):
        return type(error).__name__
    return "InternalError" if isinstance(error, Exception) else "RequestCancelled"


def error_reason(error: BaseException | None) -> str:
    """Why a request failed, in one word of docs/logs.md."""
    if isinstance(error, MantaError):
        return error.reason
    return MantaError.reason if isinstance(error, Exception) else RequestCancelled.reason
