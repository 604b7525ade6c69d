"""transformers, the other half of `manta bench decode --compare`: `generate` in a process of its own, timed per token.

A process of its own, so that neither side's threads spin on the other's cores. Its OpenMP threads spin as long as they
do by default, or as short as a coordinator's: whichever is faster on this machine, now.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster.checkpoint.architecture import Architecture, expert_tensors
from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.memory import resident_memory
from cluster.commands.bench.openmp import SPIN_COUNT, environment
from cluster.config import EngineConfig
from cluster.errors import MantaError, SetupError

EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("sdpa", "eager")
CALIBRATION_TOKENS = 6
CALIBRATION_RUNS = 2
START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 10.0
OPENMP_SETTINGS: tuple[Mapping[str, str], ...] = ({}, {SPIN_COUNT: str(EngineConfig().openmp_spin_count)})
HOPELESS = 1.5  # times the best: no second try
COPIES_FRACTION = 0.25  # of free memory: batched_mm copies the weights of an expert for each row


@dataclass(frozen=True, slots=True)
class Implementation:
    """How transformers computes experts and attention."""

    experts: str
    attention: str
    prefill_experts: str  # the same, or another where the prompt's rows do not fit

    def __str__(self) -> str:
        return f"{self.experts}, {self.attention}"


@dataclass(frozen=True, slots=True)
class _Task:
    prompts: list[list[int]]
    output_tokens: int
    implementation: Implementation
    context: int = 0  # of the prompts' tokens, so many are not computed: the cache begins with random numbers


class Reference:
    """The process; a context manager that ends it."""

    def __init__(
        self, directory: Path, architecture: Architecture, dtype: str, device: str, variables: Mapping[str, str]
    ) -> None:
        self.variables = dict(variables)
        self._architecture = architecture
        self._dtype_bytes = 2 if dtype == "bfloat16" else 4
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(directory), dtype, device), daemon=True)
        with environment(self.variables):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        try:
            self.num_threads = int(self._answer(START_TIMEOUT_S))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def run(self, workload: Workload, implementation: Implementation) -> Run:
        """Greedy, with forced length."""
        prompts = workload.prompts(self._architecture.vocab_size)
        return self.generate(prompts, workload.output_tokens, implementation, context=workload.context)

    def generate(
        self, prompts: list[list[int]], output_tokens: int, implementation: Implementation, *, context: int = 0
    ) -> Run:
        """The same for any prompts of one length."""
        self._connection.send(_Task(prompts, output_tokens, implementation, context))
        run = self._answer(None)
        assert isinstance(run, Run)
        return run

    def fastest(self, workload: Workload) -> Implementation:
        """The best of all that run at all, by the workload's own measure, in short runs."""
        decodes = workload.output_tokens > 1
        short = replace(workload, output_tokens=min(workload.output_tokens, CALIBRATION_TOKENS))
        best: tuple[float, Implementation] | None = None
        for implementation in self._candidates(workload):
            for _ in range(CALIBRATION_RUNS):
                try:
                    run = self.run(short, implementation)
                except SetupError:
                    break  # not on this machine or not with these sizes
                seconds = run.decode_s if decodes else run.prefill_s
                if best is None or seconds < best[0]:
                    best = (seconds, implementation)
                elif seconds > HOPELESS * best[0]:
                    break
        if best is None:
            raise SetupError("transformers ran with none of its implementations of experts and attention")
        return best[1]

    def _candidates(self, workload: Workload) -> list[Implementation]:
        a = self._architecture
        expert_bytes = self._dtype_bytes * sum(map(math.prod, expert_tensors(a, 0, 0).values()))
        room = COPIES_FRACTION * psutil.virtual_memory().available / expert_bytes  # rows
        rows = a.top_k * workload.num_sequences
        candidates = []
        for experts, attention in product(EXPERTS, ATTENTION):
            candidate = Implementation(experts, attention, experts)
            if experts == "batched_mm":
                computed = rows * (workload.prompt_tokens - workload.context)
                if rows > room or (workload.output_tokens == 1 and computed > room):
                    continue
                if computed > room:
                    candidate = replace(candidate, prefill_experts="grouped_mm")
            candidates.append(candidate)
        return candidates

    def _answer(self, timeout_s: float | None) -> Any:
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                raise SetupError(f"transformers did not load the model within {timeout_s:g} s")
            answer = self._connection.recv()
        except EOFError as error:
            raise SetupError("the process that runs transformers ended") from error
        if isinstance(answer, MantaError):
            raise answer
        return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def fastest_reference(
    directory: Path, architecture: Architecture, dtype: str, device: str, workload: Workload
) -> Iterator[Reference]:
    """The process with the better of two OpenMP settings, by the decode steps of a short run."""
    implementation = Implementation("eager", "sdpa", "eager")
    short = replace(workload, output_tokens=min(workload.output_tokens, CALIBRATION_TOKENS))
    best: tuple[float, Mapping[str, str]] | None = None
    for left, variables in reversed(list(enumerate(OPENMP_SETTINGS))):
        with Reference(directory, architecture, dtype, device, variables) as reference:
            runs = [reference.run(short, implementation) for _ in range(CALIBRATION_RUNS)]
            seconds = min(run.decode_s for run in runs)
            if best is None or seconds < best[0]:
                best = (seconds, variables)
            if not left and best[1] is variables:  # the last one tried is the best: no need to load again
                yield reference
                return
    assert best is not None, "there is a setting"
    with Reference(directory, architecture, dtype, device, best[1]) as reference:
        yield reference


class _Stopwatch:
    """A streamer: `generate` calls `put` with the prompt, then with each step's tokens."""

    def __init__(self, model: Any, implementation: Implementation) -> None:
        self._model = model
        self._implementation = implementation
        self._puts = 0
        self.first = self.second = self.last = 0.0  # first token; the same after a switch; last token

    def put(self, _tokens: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()
            if self._implementation.experts != self._implementation.prefill_experts:
                self._model.set_experts_implementation(self._implementation.experts)
            self.second = time.perf_counter()
        self.last = time.perf_counter()

    def end(self) -> None:
        pass


def _serve(connection: Connection, directory: str, dtype: str, device: str) -> None:
    """In the new process: load, say so, then run tasks until the other end closes."""
    import torch
    from transformers import MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = MixtralForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:
        connection.send(SetupError(f"transformers cannot load {directory}: {error}"))
        return
    connection.send(torch.get_num_threads())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_generate(model, task))
        except Exception as error:
            connection.send(SetupError(f"transformers failed with {task.implementation}: {error}"))


def _generate(model: Any, task: _Task) -> Run:
    import torch
    from transformers import GenerationConfig

    implementation = task.implementation
    model.set_attn_implementation(implementation.attention)
    model.set_experts_implementation(implementation.prefill_experts)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=task.output_tokens, eos_token_id=None, pad_token_id=0)
    model.generation_config = greedy  # what is not set is taken from here: no end of sequence
    prompts = torch.tensor(task.prompts, device=model.device)
    cache = _random_cache(model, len(prompts), task.context) if task.context else None
    stopwatch = _Stopwatch(model, implementation)
    with resident_memory() as memory:
        started = time.perf_counter()
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=greedy,
            streamer=stopwatch,
            past_key_values=cache,
        )
    token_ids: Sequence[list[int]] = output[:, prompts.shape[1] :].tolist()
    assert all(len(ids) == task.output_tokens for ids in token_ids), "the length is forced"
    return Run(
        prefill_s=stopwatch.first - started,
        decode_s=stopwatch.last - stopwatch.second,
        decode_steps=task.output_tokens - 1,
        token_ids=list(token_ids),
        peak_bytes=memory.peak,
        grown_bytes=memory.grown,
    )


def _random_cache(model: Any, num_sequences: int, context: int) -> Any:
    """Keys and values of that many tokens that nobody computed, of the order of one, as ours."""
    import torch
    from transformers import DynamicCache

    config = model.config
    shape = (num_sequences, config.num_key_value_heads, context, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        cache.update(keys, keys.flip(-1), layer)
    return cache
