"""Drives an engine for `manta bench decode`: starts all sequences of a workload in one step and times every step.

The engine runs on its own thread, as it does in a coordinator, and is used only through what is public.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.bench.decode.context import Contexts
from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.memory import resident_memory
from cluster.config import EngineConfig
from cluster.errors import ConfigError, MantaError
from cluster.messages import Key, Request, SamplingParams, TokenChunk
from cluster.planning.placement import ExpertGroup
from experts_service.kernels.compiled.route import RouteElsewhere
from experts_service.transport import Transport
from router_service.assembly import build_engine
from router_service.dispatcher import Dispatch, Dispatcher
from router_service.engine import Event

ALIVE_INTERVAL_S = 1.0


class CountingDispatcher(Dispatcher):
    """While `counting`, counts (expert, layer) pairs that get a row: each is a read of that expert's weights."""

    def __init__(self, groups: Sequence[ExpertGroup], transport: Transport) -> None:
        super().__init__(groups, transport)
        self.counting = False
        self.expert_reads = 0

    def count(self, rows: Tensor) -> None:
        if self.counting:
            self.expert_reads += int(rows.count_nonzero())
        super().count(rows)

    def dispatch_routed(self, layer: int, rows: Tensor, route: RouteElsewhere) -> Dispatch:
        if self.counting:
            self.expert_reads += int(route.counts.count_nonzero())
        return super().dispatch_routed(layer, rows, route)

    def dispatch(self, layer: int, rows: Tensor, experts: Tensor, num_real: Tensor | None = None) -> Dispatch:
        if self.counting:
            self.expert_reads += experts.unique().numel()
        return super().dispatch(layer, rows, experts, num_real)


@dataclass(slots=True)
class _Watch:
    """What one run has delivered so far. Written on the engine's thread, read once `done`."""

    keys: frozenset[Key]
    token_ids: dict[Key, list[int]]
    times: list[float] = field(default_factory=list)  # of each decode step's end; first the end of prefill
    reads: list[int] = field(default_factory=list)  # expert reads so far, at the same moments
    most_decoding: int = 0  # sequences that got a token in one step, none of them its first
    failure: MantaError | None = None
    unfinished: set[Key] = field(default_factory=set)
    done: threading.Event = field(default_factory=threading.Event)


class EngineUnderTest:
    """One engine and its dispatcher; a context manager that ends the engine."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, dispatcher: CountingDispatcher) -> None:
        self._dispatcher = dispatcher
        self._ids = count()
        self._gate: Key | None = None
        self._at_gate, self._open = threading.Event(), threading.Event()
        self._watch = _Watch(frozenset(), {})
        self._vocab_size = checkpoint.architecture.vocab_size
        self._engine = build_engine(checkpoint, config, dispatcher, self._deliver)
        self._contexts = Contexts(self._engine)
        self._engine.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.set()
        self._engine.stop()
        self._dispatcher.close()

    @property
    def kernels(self) -> dict[str, str]:
        """Which ones run, as the engine says."""
        return self._engine.model_runner.kernels

    def run(self, workload: Workload) -> Run:
        """Greedy, with forced length. Raises what the engine raises, and ConfigError where nothing was decoded."""
        with resident_memory() as memory:
            watch = self._watched_run(workload)
        started, first, last = watch.times[0], watch.times[1], watch.times[-1]
        return Run(
            prefill_s=first - started,
            decode_s=last - first,
            decode_steps=len(watch.times) - 2,
            token_ids=list(watch.token_ids.values()),
            peak_bytes=memory.peak,
            grown_bytes=memory.grown,
        )

    def count_expert_reads(self, workload: Workload) -> float:
        """The same run, untimed: experts with at least one row, summed over layers; mean over the decode steps."""
        runner = self._engine.model_runner
        graphs, runner.graphs = runner.graphs, None  # a step that is replayed tells nobody what it dispatches
        self._dispatcher.counting = True
        try:
            watch = self._watched_run(workload)
        finally:
            self._dispatcher.counting = False
            runner.graphs = graphs
        if graphs is not None:
            self._watched_run(workload)  # captures them
        return (watch.reads[-1] - watch.reads[0]) / max(len(watch.reads) - 1, 1)

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Greedy tokens of prompts that begin together, with forced length. Raises what the engine raises."""
        return list(self._watched(prompts, output_tokens).token_ids.values())

    def _watched_run(self, workload: Workload) -> _Watch:
        watch = self._watched(workload.prompts(self._vocab_size), workload.output_tokens, cached=bool(workload.context))
        if len(watch.times) < min(3, 1 + workload.output_tokens):
            raise ConfigError(
                f"{workload.num_sequences} prompts of {workload.prompt_tokens} tokens do not decode side by side: the "
                f"first of them ends before the last is computed. {watch.most_decoding} would, or with more "
                f"--output-tokens; with --context {workload.prompt_tokens} nothing has to be computed"
            )
        return watch

    def _watched(self, prompts: Sequence[Sequence[int]], output_tokens: int, *, cached: bool = False) -> _Watch:
        """Hold the engine at the end of a step, queue everything, let go: all prompts begin in the next step.

        `cached`: all but their last tokens are put into the cache before.
        """
        requests = [self._request(prompt, output_tokens) for prompt in prompts]
        keys = [request.key for request in requests]
        gate = self._request([1], 1)
        self._at_gate.clear()
        self._open.clear()
        self._watch = watch = _Watch(frozenset(keys), {key: [] for key in keys}, unfinished=set(keys))
        self._gate = gate.key
        self._engine.submit(gate)
        self._wait(self._at_gate)
        if cached:
            self._contexts.fill(prompts)
        for request in requests:
            self._engine.submit(request)
        watch.times.append(time.perf_counter())
        self._open.set()
        self._wait(watch.done)
        if watch.failure is not None:
            raise watch.failure
        return watch

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(ALIVE_INTERVAL_S):
            self._engine.check_alive()

    def _request(self, prompt: Sequence[int], output_tokens: int) -> Request:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        return Request(f"bench-{next(self._ids)}", tuple(prompt), sampling, seed=0)

    def _deliver(self, events: list[Event]) -> None:
        """On the engine's thread, once a step."""
        now = time.perf_counter()
        watch = self._watch
        if any(key == self._gate for key, _ in events):
            self._gate = None
            self._at_gate.set()
            self._open.wait()
            return
        watch.most_decoding = max(watch.most_decoding, sum(bool(watch.token_ids.get(key)) for key, _ in events))
        full = not any(len(tokens) == 0 for tokens in watch.token_ids.values())  # before this step
        for key, item in events:
            if isinstance(item, MantaError):
                watch.failure = item
                watch.done.set()
                return
            assert isinstance(item, TokenChunk), "no embedding was asked for"
            watch.token_ids[key] += item.token_ids
            if item.finish_reason is not None:
                watch.unfinished.discard(key)
        if (full and len(events) == len(watch.keys)) or (
            not full and all(len(tokens) > 0 for tokens in watch.token_ids.values())
        ):
            watch.times.append(now)
            watch.reads.append(self._dispatcher.expert_reads)
        if not watch.unfinished:
            watch.done.set()
