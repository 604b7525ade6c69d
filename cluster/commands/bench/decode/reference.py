"""transformers, the other half of `manta bench decode --compare`: `generate`, timed per token.

Its OpenMP threads spin as long as they do by default, or as short as a coordinator's: whichever is faster on this
machine, now.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from cluster.checkpoint.architecture import Architecture
from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.decode.rival_process import CALIBRATION_RUNS, CALIBRATION_TOKENS, RivalProcess, serve_tasks
from cluster.commands.bench.memory import resident_memory
from cluster.commands.bench.openmp import SPIN_COUNT
from cluster.config import EngineConfig
from cluster.errors import SetupError

EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("sdpa", "eager")
OPENMP_SETTINGS: tuple[Mapping[str, str], ...] = ({}, {SPIN_COUNT: str(EngineConfig().openmp_spin_count)})  # on a CPU
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
    implementation: Implementation
    prompts: list[list[int]]
    output_tokens: int
    context: int  # of the prompts' tokens, so many are not computed: the cache begins with random numbers


class Reference(RivalProcess[Implementation]):
    """The process."""

    name = "transformers"

    def __init__(
        self, directory: Path, architecture: Architecture, dtype: str, device: str, variables: Mapping[str, str]
    ) -> None:
        super().__init__(_serve, str(directory), dtype, device, variables=variables)
        self._architecture = architecture
        self._dtype_bytes = 2 if dtype == "bfloat16" else 4
        self._on_cpu = device == "cpu"

    def run(self, workload: Workload, way: Implementation) -> Run:
        prompts = workload.prompts(self._architecture.vocab_size)
        return self.generate(prompts, workload.output_tokens, way, context=workload.context)

    def generate(self, prompts: list[list[int]], output_tokens: int, way: Implementation, *, context: int = 0) -> Run:
        """The same for any prompts of one length."""
        return self._ask(_Task(way, prompts, output_tokens, context))

    def ways(self, workload: Workload) -> list[Implementation]:
        a = self._architecture
        expert_bytes = self._dtype_bytes * 3 * a.hidden_size * a.intermediate_size
        room = COPIES_FRACTION * _free_bytes(on_cpu=self._on_cpu) / expert_bytes  # rows
        rows = a.top_k * workload.num_sequences
        computed = rows * (workload.prompt_tokens - workload.context)
        ways = []
        for experts, attention in product(EXPERTS, ATTENTION):
            way = Implementation(experts, attention, experts)
            if experts == "batched_mm":
                if rows > room or (workload.output_tokens == 1 and computed > room):
                    continue
                if computed > room:
                    way = replace(way, prefill_experts="grouped_mm")
            ways.append(way)
        return ways


@contextmanager
def fastest_reference(
    directory: Path, architecture: Architecture, dtype: str, device: str, workload: Workload
) -> Iterator[Reference]:
    """The process; on a CPU with the better of two OpenMP settings, by the decode steps of a short run."""
    if device != "cpu":
        with Reference(directory, architecture, dtype, device, {}) as reference:
            yield reference
        return
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


def _free_bytes(*, on_cpu: bool) -> int:
    """Where weights are."""
    import torch

    return int(psutil.virtual_memory().available if on_cpu else torch.cuda.mem_get_info()[0])


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
    """In the new process."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:
        connection.send(SetupError(f"transformers cannot load {directory}: {error}"))
        return
    serve_tasks(connection, torch.get_num_threads(), lambda task: _generate(model, task))


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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (num_sequences, config.num_key_value_heads, context, head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        cache.update(keys, keys.flip(-1), layer)
    return cache
