"""`manta bench decode`: lays out the runs of the engine and of others in turn. Times nothing itself, draws nothing.

for each batch:   count the expert reads (warms up, too) → calibrate the others → rounds of runs, order alternating
for each prefill: the same, of one output token

Tried, bench model, 4 expert processes on 2 cores, and not kept:
- One thread for all of the coordinator: 52.0 ms a step at batch 1 instead of 48.7. Kept: one for the attention of few
  rows (`router_service/model/step_threads.py`), all for the rest.
- Huge pages for packed weights, asked for after packing (MADV_COLLAPSE): one matmul of four rows took 0.94 to 0.97 of
  the time, a step of one sequence in one process 0.92 or 1.04, whichever of two engines there had them; 2.6 s a GB to
  move. For all that malloc gives (GLIBC_TUNABLES=glibc.malloc.hugetlb=1): 51.6 and 54.2 ms with, 47.6 without.
- A buffer for the answers of one row that is kept from layer to layer, and one sum in place of two additions: 0.99 of
  a step (12 runs in turn).
- Experts of the coordinator's process one after the other on all threads, which spin for longer (20,000 and 100,000)
  between matmuls, instead of side by side: 25.5 ms a step instead of 27 in one quarter of an hour, 36 instead of 31 in
  the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from cluster.checkpoint.architecture import Architecture, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, ModelImpl, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.decode.cores import Cores
from cluster.commands.bench.decode.engine import CountingDispatcher, EngineUnderTest
from cluster.commands.bench.decode.experts import deployed_experts, local_experts
from cluster.commands.bench.decode.figures import (
    DecodeResult,
    Loading,
    PrefillResult,
    Rival,
    Run,
    Workload,
    equal_share,
    kv_bytes_per_step,
    weight_bytes_per_step,
)
from cluster.commands.bench.decode.gguf_file import GgufType
from cluster.commands.bench.decode.llama_cpp import llama_cpp
from cluster.commands.bench.decode.local_rival import LocalRival
from cluster.commands.bench.decode.reference import fastest_reference
from cluster.commands.bench.decode.rival_process import RivalProcess
from cluster.commands.bench.decode.setup import check_memory, config_for, even_groups
from cluster.commands.bench.decode.tables import draw_decode, draw_prefill
from cluster.commands.bench.machine import read_bandwidth, this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.shapes import num_parameters
from cluster.config import ModelConfig
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import ConfigError
from cluster.planning.placement import DTYPE_BYTES, Dtype, WeightBytes, as_one, kv_bytes_per_token, kv_dtype
from cluster.planning.weights import held_weights
from router_service.assembly import resolve_device

PREFILLS = (Workload(16, 64, 1), Workload(1, 2048, 1))

Other = RivalProcess[Any] | LocalRival
Tell = Callable[[str, int], None]  # what is done now, and how many runs more are done


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, as the command line says."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # put into the cache; none: prompts of `prompt_tokens` are computed
    transport: str
    num_groups: int | None
    prompt_tokens: int
    output_tokens: int
    pairs: int
    transformers: bool  # whether to compare with it
    local: bool  # the same, with an engine that has its experts in this process
    gguf_types: tuple[str, ...]  # of llama.cpp's weights; none: it is not compared with
    dtype: str
    quantizations: tuple[str, ...]  # as `engine.quantization` has them; an engine each
    kv_cache_dtypes: tuple[str, ...]  # as `engine.kv_cache_dtype` has them; an engine each, with each quantization
    model_impls: tuple[Literal["auto", "native", "transformers"], ...]  # an engine each, with each of these
    prefills: tuple[Workload, ...] | None  # None: PREFILLS, as long as the context allows
    cores: Cores | None  # of the shards and of all else; None: all run on all

    def decodes(self) -> list[Workload]:
        """Every batch with every length."""
        if not self.contexts:
            return [Workload(batch, self.prompt_tokens, self.output_tokens) for batch in self.batches]
        return [
            Workload.after_context(batch, context, self.output_tokens)
            for context in self.contexts
            for batch in self.batches
        ]


def run(model: str | None, plan: Plan) -> None:
    """Raises MantaError for whatever a user can mend."""
    checkpoints = [_opened(resolve_model(model) if model else DEMO, impl) for impl in plan.model_impls]
    checkpoint = checkpoints[0]
    architecture = checkpoint.architecture
    decodes = plan.decodes()
    prefills = _usual_prefills(architecture) if plan.prefills is None else plan.prefills
    groups = even_groups(architecture, plan.transport, plan.num_groups)
    if plan.transport != "local" and len(plan.quantizations) * len(plan.kv_cache_dtypes) * len(checkpoints) > 1:
        raise ConfigError("several engines are measured with --transport local")
    if plan.transport != "local" and plan.quantizations != ("none",):
        raise ConfigError("--quantization is measured with --transport local")
    if plan.transport == "local" and plan.local:
        raise ConfigError("--compare local: give --transport auto, so that there is something to compare")
    configs = [
        config_for(
            of_impl,
            groups,
            [*decodes, *prefills],
            transport=plan.transport,
            dtype=plan.dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
        for of_impl, quantization, kv_cache_dtype in product(checkpoints, plan.quantizations, plan.kv_cache_dtypes)
    ]
    read_from = {of_impl.model_impl: of_impl for of_impl in checkpoints}
    settings = configs[0].engine
    device, dtype = resolve_device(settings), compute_dtype(settings.dtype, architecture)
    kept_in = {_named(one, dtype): kv_dtype(one.engine.kv_cache_dtype, dtype, device.type) for one in configs}
    sizes = {_named(one, dtype): read_from[_impl(one)].architecture for one in configs}
    num_engines = len(configs) + plan.local
    for name, kept in kept_in.items():
        check_memory(sizes[name], dtype, device, [*decodes, *prefills], engines=num_engines, kv_dtype=kept)

    machine, output = this_machine(), Output()
    model_name = checkpoint.directory.name
    lengths = (
        f"{', '.join(map(str, plan.contexts))} tokens in the cache, random"
        if plan.contexts
        else f"{plan.prompt_tokens} prompt"
    )
    output.header(
        machine,
        [
            f"{model_name}: {num_parameters(architecture) / 1e9:.3g} B parameters, {dtype} on {device.type}, "
            f"{plan.transport}, {len(groups)} expert groups",
            f"{lengths} and {plan.output_tokens} output tokens, {plan.pairs} runs",
            *([str(plan.cores)] if plan.cores else []),
        ],
    )
    bandwidth = read_bandwidth(device.type)
    output.line(f"memory read by all cores: {bandwidth / 1e9:.1f} GB/s")
    bytes_of_token = {name: kv_bytes_per_token(sizes[name], kept) for name, kept in kept_in.items()}
    if plan.transport == "local" and device.type == "cuda":
        groups = as_one(groups)
    with ExitStack() as stack:
        bars = stack.enter_context(output.progress())
        bar = bars.add_task("loading", total=(len(decodes) + len(prefills)) * (1 + plan.pairs))

        def tell(text: str, done: int = 0) -> None:
            bars.update(bar, description=text, advance=done)

        engines: dict[str, EngineUnderTest] = {}
        held: dict[str, WeightBytes] = {}
        loadings: list[Loading] = []
        for of_one in configs:
            name, rounded = _named(of_one, dtype), read_from[_impl(of_one)].rounded(of_one.engine.rounding)
            tell(f"loading {name}")
            started, resident = time.perf_counter(), psutil.Process().memory_info().rss
            held[name] = held_weights(rounded, dtype, device.type)
            if plan.transport == "local":
                transport = stack.enter_context(local_experts(rounded, groups, getattr(torch, dtype), device))
            else:
                transport = stack.enter_context(deployed_experts(rounded, of_one, plan.cores))
            dispatcher = CountingDispatcher(groups, transport)
            engines[name] = stack.enter_context(EngineUnderTest(rounded, of_one.engine, dispatcher))
            grown = psutil.Process().memory_info().rss - resident
            loadings.append(Loading(name, time.perf_counter() - started, grown))
        kernels = engines[_named(configs[0], dtype)].kernels
        output.line("kernels: " + "; ".join(f"{what}: {which}" for what, which in kernels.items()))
        others: list[Other] = []
        if plan.local:
            tell("loading experts here")
            together = as_one(groups) if device.type == "cuda" else groups
            local = stack.enter_context(local_experts(checkpoint, together, getattr(torch, dtype), device))
            beside = EngineUnderTest(checkpoint, settings, CountingDispatcher(together, local))
            others.append(LocalRival(stack.enter_context(beside)))
        if plan.transformers:
            tell("loading transformers")
            arguments = (checkpoint.directory, architecture, dtype, device.type, decodes[0])
            others.append(stack.enter_context(fastest_reference(*arguments)))
        for kind in map(GgufType, plan.gguf_types):
            tell(f"writing {kind} for llama.cpp")
            others.append(stack.enter_context(llama_cpp(checkpoint, kind)))

        decode_results = []
        for workload in decodes:
            tell(f"batch {workload}: warming up")
            reads = {name: engine.count_expert_reads(workload) for name, engine in engines.items()}
            ours, rivals = _rounds(engines, others, workload, plan.pairs, tell)
            for name, runs in ours.items():
                weights = weight_bytes_per_step(
                    architecture, held[name], DTYPE_BYTES[dtype], workload.num_sequences, reads[name]
                )
                kv = kv_bytes_per_step(workload, bytes_of_token[name], architecture.sliding_window)
                first = next(iter(ours.values()))
                same = equal_share(first[-1].token_ids, runs[-1].token_ids)
                decode_results.append(DecodeResult(workload, runs, weights, kv, bandwidth, rivals, name, same))
        prefill_results = []
        for workload in prefills:
            tell(f"prefill {workload}: warming up")
            for engine in engines.values():
                engine.run(workload)
            ours, rivals = _rounds(engines, others, workload, plan.pairs, tell)
            for name, runs in ours.items():
                here = held[name].coordinator
                if plan.transport == "local":
                    here += architecture.num_experts * held[name].expert
                kv_bytes = workload.num_sequences * workload.prompt_tokens * bytes_of_token[name]
                prefill_results.append(PrefillResult(workload, runs, here, kv_bytes, rivals, name))

    output.line("loaded, the first with what all need: " + "; ".join(map(str, loadings)))
    rows = [result.to_json() for result in decode_results]
    prefill_rows = [result.to_json() for result in prefill_results]
    draw_decode(rows, output)
    if prefill_rows:
        draw_prefill(prefill_rows, output)
    document = {
        "bench": "decode",
        "model": model_name,
        "fingerprint": checkpoint.fingerprint[:8],
        "dtype": dtype,
        "device": device.type,
        "transport": plan.transport,
        "groups": len(groups),
        "shard_cores": len(plan.cores.of_shards) if plan.cores else None,
        "threads": torch.get_num_threads(),
        "kernels": kernels,
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "machine": machine.to_json(),
        "rivals": [
            {"name": other.name, "threads": other.num_threads, "environment": other.variables} for other in others
        ],
        "loading": [one.to_json() for one in loadings],
        "results": rows,
        "prefill": prefill_rows,
    }
    output.json(document)


def _rounds(
    engines: Mapping[str, EngineUnderTest],
    others: Sequence[Other],
    workload: Workload,
    rounds: int,
    tell: Tell,
) -> tuple[dict[str, tuple[Run, ...]], tuple[Rival, ...]]:
    """Runs of all, one after the other; in every other round in reverse."""
    what = f"batch {workload}" if workload.output_tokens > 1 else f"prefill {workload}"
    ways = []
    for other in others:
        tell(f"{what}: choosing the fastest way of {other.name}", 0)
        ways.append(other.fastest(workload))
    calls: list[Callable[[], Run]] = [
        partial(other.run, workload, way) for other, way in zip(others, ways, strict=True)
    ]
    calls += [partial(engine.run, workload) for engine in engines.values()]
    runs: list[list[Run]] = [[] for _ in calls]
    for number in range(rounds):
        tell(f"{what}: run {number + 1}", 1)
        turns = list(zip(calls, runs, strict=True))
        for call, done in reversed(turns) if number % 2 else turns:
            done.append(call())
    tell(what, 1)
    of_others, of_engines = runs[: len(others)], runs[len(others) :]
    rivals = (Rival(o.name, tuple(done), str(way)) for o, done, way in zip(others, of_others, ways, strict=True))
    return dict(zip(engines, map(tuple, of_engines), strict=True)), tuple(rivals)


def _opened(directory: Path, model_impl: Literal["auto", "native", "transformers"]) -> Checkpoint:
    """Keys and values being as wide as whoever computes has them."""
    checkpoint = open_checkpoint(directory, model_impl)
    checkpoint.check_head()
    if checkpoint.model_impl == "native":
        return checkpoint
    from experts_service.transformers_backend.meta_model import checked  # takes seconds to import

    return checked(checkpoint, 1)  # longer contexts are looked at when it is loaded


def _impl(config: ModelConfig) -> ModelImpl:
    assert config.model_impl != "auto", "a checkpoint knows"
    return config.model_impl


def _named(config: ModelConfig, dtype: Dtype) -> str:
    """`int8, keys and values int8`: what weights are kept in, what is in the cache where that is another dtype, and
    whose code computes where it is not ours.
    """
    engine = config.engine
    parts: list[str] = [dtype if engine.quantization == "none" else engine.quantization]
    if engine.kv_cache_dtype != "auto":
        parts.append(f"keys and values {engine.kv_cache_dtype}")
    if config.model_impl == "transformers":
        parts.append("transformers backend")
    return ", ".join(parts)


def _usual_prefills(architecture: Architecture) -> tuple[Workload, ...]:
    longest = architecture.max_position_embeddings - 1
    return tuple(replace(workload, prompt_tokens=min(workload.prompt_tokens, longest)) for workload in PREFILLS)
