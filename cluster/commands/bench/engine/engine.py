"""`manta bench engine`: what a step of decoding sequences spends where, at several contexts side by side.

What is Python per sequence may not grow with the context: it shows where two columns differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import torch

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.decode.engine import CountingDispatcher, EngineUnderTest
from cluster.commands.bench.decode.experts import local_experts
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.setup import check_memory, config_for, even_groups
from cluster.commands.bench.engine.parts import BENCHMARK, NAMES, Parts, Step
from cluster.commands.bench.machine import this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.shapes import num_parameters
from cluster.demo_model import DIRECTORY as DEMO
from router_service.assembly import resolve_device

NOTHING = Workload(1, 1, 1)  # decodes nothing; before it runs, the last step of what ran before is over
PYTHON = ("schedule", "metadata", "update", "deliver", "the rest")  # the parts that know no tensor's numbers


@dataclass(frozen=True, slots=True)
class PartsResult:
    """One batch at one context: each part's median over the steps."""

    batch: int
    context: int
    num_steps: int
    ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        """Of a step."""
        return sum(self.ms.values())

    @property
    def python_ms(self) -> float:
        """Of it, what is not the model's and not the sampler's."""
        return sum(self.ms[part] for part in PYTHON)

    def to_json(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "context": self.context,
            "steps": self.num_steps,
            "ms_per_step": round(self.total_ms, 3),
            "python_ms": round(self.python_ms, 3),
            "parts_ms": {part: round(ms, 4) for part, ms in self.ms.items()},
        }


def run(model: str | None, batches: Sequence[int], contexts: Sequence[int], steps: int, dtype: str) -> None:
    """Raises MantaError for whatever a user can mend."""
    checkpoint = open_checkpoint(resolve_model(model) if model else DEMO)
    architecture = checkpoint.architecture
    # The first step ends the prompts, and the last one the sequences: neither is a step like the others.
    workloads = [Workload.after_context(batch, context, steps + 2) for batch, context in product(batches, contexts)]
    groups = even_groups(architecture, "local", None)
    config = config_for(checkpoint, groups, workloads, dtype=dtype)
    device, dtype_name = resolve_device(config.engine), compute_dtype(config.engine.dtype, architecture)
    check_memory(architecture, dtype_name, device, workloads)
    machine, output = this_machine(), Output()
    output.header(
        machine,
        [
            f"{checkpoint.directory.name}: {num_parameters(architecture) / 1e9:.3g} B parameters, {dtype_name} on "
            f"{device.type}, experts in this process; medians of {steps} steps"
        ],
    )
    results: list[PartsResult] = []
    parts = Parts()
    with (
        parts.timed(),
        local_experts(checkpoint, groups, getattr(torch, dtype_name), device) as transport,
        EngineUnderTest(checkpoint, config.engine, CountingDispatcher(groups, transport)) as engine,
        output.progress() as progress,
    ):
        kernels = engine.kernels
        for workload in progress.track(workloads, description="steps"):
            engine.run(replace(workload, output_tokens=2))  # warms up
            engine.run(NOTHING)
            parts.steps.clear()
            engine.run(workload)
            engine.run(NOTHING)
            results.append(_result(workload, parts.steps))
    output.line("kernels: " + "; ".join(f"{what}: {which}" for what, which in kernels.items()))
    for batch in dict.fromkeys(batches):
        _draw([result for result in results if result.batch == batch], output)
    output.json(
        {
            "bench": "engine",
            "model": checkpoint.directory.name,
            "dtype": dtype_name,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "kernels": kernels,
            "machine": machine.to_json(),
            "results": [result.to_json() for result in results],
        }
    )


def _result(workload: Workload, steps: Sequence[Step]) -> PartsResult:
    full = [step.seconds for step in steps if step.num_decoding == workload.num_sequences][:-1]
    ms = {part: 1e3 * median(seconds.get(part, 0.0) for seconds in full) for part in NAMES}
    assert BENCHMARK not in ms, "it is no part of a step"
    return PartsResult(workload.num_sequences, workload.context, len(full), ms)


def _draw(results: Sequence[PartsResult], output: Output) -> None:
    """A line a part, and for each context its milliseconds a step and microseconds a sequence."""
    batch = results[0].batch
    columns = ["part"]
    for result in results:
        columns += [f"{result.context}: ms", "µs/sequence"]
    lines = [(part, [result.ms[part] for result in results]) for part in NAMES]
    lines.append(("a step", [result.total_ms for result in results]))
    lines.append((f"of it Python ({', '.join(PYTHON)})", [result.python_ms for result in results]))
    rows = [
        [name, *(cell for ms in values for cell in (f"{ms:.3f}", f"{1e3 * ms / batch:.1f}"))] for name, values in lines
    ]
    output.table(f"{batch} sequences, by tokens of context", columns, rows)
