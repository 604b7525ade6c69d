"""`manta bench decode`: lays out the runs of engine and transformers in turn. Times nothing itself, draws nothing.

for each batch:   count the expert reads (warms up, too) → calibrate transformers → pairs of runs, order alternating
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

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from pydantic import ValidationError

from cluster.checkpoint.architecture import Architecture, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.decode.engine import CountingDispatcher, EngineUnderTest
from cluster.commands.bench.decode.experts import deployed_experts, local_experts
from cluster.commands.bench.decode.figures import DecodeResult, PrefillResult, Rival, Run, Workload, bytes_per_step
from cluster.commands.bench.decode.reference import Implementation, Reference, fastest_reference
from cluster.commands.bench.decode.tables import draw_decode, draw_prefill
from cluster.commands.bench.machine import read_bandwidth, this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.shapes import num_parameters
from cluster.config import EngineConfig, ExpertsConfig, ModelConfig
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import ConfigError
from cluster.planning.placement import DTYPE_BYTES, ExpertGroup, plan_groups
from router_service.assembly import resolve_device

BLOCK_SIZE = 16
DEFAULT_GROUPS = 4
PREFILLS = (Workload(16, 64, 1), Workload(1, 2048, 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, as the command line says."""

    batches: tuple[int, ...]
    transport: str
    num_groups: int | None
    prompt_tokens: int
    output_tokens: int
    pairs: int
    compare: bool
    dtype: str
    prefill: bool


def run(model: str | None, plan: Plan) -> None:
    """Raises MantaError for whatever a user can mend."""
    checkpoint = open_checkpoint(resolve_model(model) if model else DEMO)
    architecture = checkpoint.architecture
    decodes = [Workload(batch, plan.prompt_tokens, plan.output_tokens) for batch in plan.batches]
    prefills = _prefills(architecture) if plan.prefill else []
    groups = _groups(plan, architecture)
    config = _config(checkpoint, plan, groups, [*decodes, *prefills])
    device, dtype = resolve_device(config.engine), compute_dtype(config.engine.dtype, architecture)

    machine, output = this_machine(), Output()
    name = checkpoint.directory.name
    output.header(
        machine,
        [
            f"{name}: {num_parameters(architecture) / 1e9:.3g} B parameters, {dtype} on {device.type}, "
            f"{plan.transport}, {len(groups)} expert groups",
            f"{plan.prompt_tokens} prompt and {plan.output_tokens} output tokens, {plan.pairs} runs",
        ],
    )
    bandwidth = read_bandwidth(device.type)
    output.line(f"memory read by all cores: {bandwidth / 1e9:.1f} GB/s")
    with ExitStack() as stack:
        bars = stack.enter_context(output.progress())
        bar = bars.add_task("loading", total=(len(decodes) + len(prefills)) * (1 + plan.pairs))

        def tell(text: str, done: int = 0) -> None:
            bars.update(bar, description=text, advance=done)

        if plan.transport == "local":
            transport = stack.enter_context(local_experts(checkpoint, groups, getattr(torch, dtype), device))
        else:
            transport = stack.enter_context(deployed_experts(checkpoint, config))
        dispatcher = CountingDispatcher(groups, transport)
        engine = stack.enter_context(EngineUnderTest(checkpoint, config.engine, dispatcher))
        reference = None
        if plan.compare:
            tell("loading transformers")
            reference = stack.enter_context(
                fastest_reference(checkpoint.directory, architecture, dtype, device.type, decodes[0])
            )

        decode_results = []
        for workload in decodes:
            tell(f"batch {workload.num_sequences}: warming up")
            reads = engine.count_expert_reads(workload.prompts(architecture.vocab_size), workload.output_tokens)
            touched = bytes_per_step(architecture, DTYPE_BYTES[dtype], workload.num_sequences, reads)
            ours, theirs = _pairs(engine, reference, workload, architecture, plan.pairs, tell)
            decode_results.append(DecodeResult(workload, ours, touched, bandwidth, theirs))
        prefill_results = []
        for workload in prefills:
            tell(f"prefill {workload.num_sequences} × {workload.prompt_tokens}: warming up")
            engine.run(workload.prompts(architecture.vocab_size), 1)
            ours, theirs = _pairs(engine, reference, workload, architecture, plan.pairs, tell)
            prefill_results.append(PrefillResult(workload, ours, theirs))

    rows = [result.to_json() for result in decode_results]
    prefill_rows = [result.to_json() for result in prefill_results]
    draw_decode(rows, output, compared=plan.compare)
    if prefill_rows:
        draw_prefill(prefill_rows, output, compared=plan.compare)
    document = {
        "bench": "decode",
        "model": name,
        "fingerprint": checkpoint.fingerprint[:8],
        "dtype": dtype,
        "device": device.type,
        "transport": plan.transport,
        "groups": len(groups),
        "threads": torch.get_num_threads(),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "machine": machine.to_json(),
        "transformers_environment": reference.variables if reference is not None else None,
        "results": rows,
        "prefill": prefill_rows,
    }
    output.json(document)


def _pairs(
    engine: EngineUnderTest,
    reference: Reference | None,
    workload: Workload,
    architecture: Architecture,
    pairs: int,
    tell: Callable[[str, int], None],
) -> tuple[tuple[Run, ...], Rival | None]:
    """Runs of both, one after the other, the first of a pair alternating."""
    prompts = workload.prompts(architecture.vocab_size)
    what = f"batch {workload.num_sequences}" if workload.output_tokens > 1 else f"prefill {workload.num_sequences}"
    implementation: Implementation | None = None
    if reference is not None:
        tell(f"{what}: choosing transformers' fastest implementations", 0)
        implementation = reference.fastest(workload)
    ours: list[Run] = []
    theirs: list[Run] = []
    for pair in range(pairs):
        tell(f"{what}: run {pair + 1}", 1)
        if reference is None or implementation is None:
            ours.append(engine.run(prompts, workload.output_tokens))
            continue
        if pair % 2:
            theirs.append(reference.run(prompts, workload.output_tokens, implementation))
        ours.append(engine.run(prompts, workload.output_tokens))
        if not pair % 2:
            theirs.append(reference.run(prompts, workload.output_tokens, implementation))
    tell(what, 1)
    if implementation is None:
        return tuple(ours), None
    return tuple(ours), Rival(tuple(theirs), implementation.experts, implementation.attention)


def _prefills(architecture: Architecture) -> list[Workload]:
    """Those of the table, as long as the context allows."""
    longest = architecture.max_position_embeddings - 1
    return [Workload(w.num_sequences, min(w.prompt_tokens, longest), 1) for w in PREFILLS]


def _groups(plan: Plan, architecture: Architecture) -> tuple[ExpertGroup, ...]:
    """Neighbouring experts together, sizes as even as can be."""
    num_experts = architecture.num_experts
    number = plan.num_groups or (1 if plan.transport == "local" else min(DEFAULT_GROUPS, num_experts))
    if number > num_experts:
        raise ConfigError(f"--groups {number}: the model has {num_experts} experts")
    bounds = [num_experts * i // number for i in range(number + 1)]
    setting = [range(bounds[i], bounds[i + 1]) for i in range(number)]
    return plan_groups(setting, num_experts, 0, 0)


def _config(
    checkpoint: Checkpoint, plan: Plan, groups: tuple[ExpertGroup, ...], workloads: list[Workload]
) -> ModelConfig:
    """What `manta serve` would be configured with, and a cache for the largest workload."""
    longest = max(w.prompt_tokens + w.output_tokens for w in workloads)
    context = checkpoint.architecture.max_position_embeddings
    if longest > context:
        raise ConfigError(f"prompt and output are {longest} tokens, and the model's context is {context}")
    blocks = max(w.num_sequences * _blocks_of(w) for w in workloads)
    most = max(w.num_sequences for w in workloads)
    try:
        engine = EngineConfig.model_validate(
            {
                "dtype": plan.dtype,
                "max_model_len": longest,
                "block_size": BLOCK_SIZE,
                "num_kv_blocks": blocks + 1,  # and one for the request that holds the others back
                "max_num_seqs": max(most, EngineConfig().max_num_seqs),
                "max_waiting": max(most, EngineConfig().max_waiting),
                "prefix_caching": False,  # every run has the same prompts
            }
        )
        experts = ExpertsConfig.model_validate(
            {"groups": tuple(group.experts for group in groups), "transport": plan.transport}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return ModelConfig(name="bench", path=str(checkpoint.directory), engine=engine, experts=experts)


def _blocks_of(workload: Workload) -> int:
    """KV blocks for each sequence: its tokens, and what has to be free for it to grow so that all begin in one step."""
    tokens = -(-(workload.prompt_tokens + workload.output_tokens) // BLOCK_SIZE)
    return tokens + max(1, workload.prompt_tokens // (8 * BLOCK_SIZE))
