"""`manta bench divergence`: where greedy tokens leave those of transformers, and whether a batch changes them.

In bf16 sums are rounded, and any other order of them may choose another token sooner or later. So nobody's tokens are
the right ones; those of fp32 are the closest to it. An engine diverges from them no more often than transformers' own
bf16 does, or it loses precision somewhere. After its first difference a text is another one and counts no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.decode.engine import CountingDispatcher, EngineUnderTest
from cluster.commands.bench.decode.experts import local_experts
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.reference import Implementation, Reference
from cluster.commands.bench.decode.setup import check_memory, config_for, even_groups
from cluster.commands.bench.machine import this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.shapes import num_parameters
from cluster.demo_model import DIRECTORY as DEMO
from router_service.assembly import resolve_device

Tokens = Sequence[Sequence[int]]  # of each prompt, all of one length

# Transformers' plainest: one expert after the other, and torch's attention.
PLAIN = Implementation("eager", "sdpa", "eager")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tokens of one against those of another."""

    name: str
    against: str
    firsts: tuple[int | None, ...]  # of each prompt, the position of the first difference; None: there is none
    output_tokens: int

    @classmethod
    def of(cls, name: str, tokens: Tokens, against: str, others: Tokens) -> Comparison:
        """Prompt by prompt."""
        firsts = tuple(
            next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            for a, b in zip(tokens, others, strict=True)
        )
        return cls(name, against, firsts, len(tokens[0]))

    @property
    def num_equal(self) -> int:
        """Prompts without a difference."""
        return self.firsts.count(None)

    @property
    def rate(self) -> float:
        """Differences per token that could have been the first one."""
        exposed = sum(self.output_tokens if first is None else first + 1 for first in self.firsts)
        return (len(self.firsts) - self.num_equal) / exposed

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "against": self.against,
            "prompts": len(self.firsts),
            "equal": self.num_equal,
            "rate": round(self.rate, 6),
            "first_differences": self.firsts,
        }


def run(
    model: str | None,
    num_prompts: int,
    prompt_tokens: int,
    output_tokens: int,
    batch: int,
    dtype: str,
    kv_cache_dtype: str = "auto",
) -> None:
    """Raises MantaError for whatever a user can mend."""
    checkpoint = open_checkpoint(resolve_model(model) if model else DEMO)
    checkpoint.check_head()
    architecture = checkpoint.architecture
    workload = Workload(num_prompts, prompt_tokens, output_tokens)
    groups = even_groups(architecture, "local", None)
    config = config_for(checkpoint, groups, [workload], dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    device, dtype_name = resolve_device(config.engine), compute_dtype(config.engine.dtype, architecture)
    check_memory(architecture, dtype_name, device, [workload])
    machine, output = this_machine(), Output()
    output.header(
        machine,
        [
            f"{checkpoint.directory.name}: {num_parameters(architecture) / 1e9:.3g} B parameters on {device.type}",
            f"{num_prompts} random prompts of {prompt_tokens} tokens, {output_tokens} greedy tokens each",
        ],
    )
    prompts = workload.prompts(architecture.vocab_size)
    exact_cache: Tokens | None = None  # ours, where keys and values are not kept in the dtype
    theirs: dict[str, tuple[Tokens, Tokens]] = {}  # by dtype: alone, in batches
    with output.progress() as bars:
        bar = bars.add_task("", total=3)
        for name in dict.fromkeys(("float32", dtype_name)):
            bars.update(bar, description=f"transformers in {name}")
            with Reference(checkpoint.directory, architecture, name, device.type, {}) as reference:
                theirs[name] = (
                    _in_batches(lambda part: reference.generate(part, output_tokens, PLAIN).token_ids, prompts, 1),
                    _in_batches(lambda part: reference.generate(part, output_tokens, PLAIN).token_ids, prompts, batch),
                )
            bars.advance(bar)
        bars.update(bar, description="Manta")
        with (
            local_experts(checkpoint, groups, getattr(torch, dtype_name), device) as transport,
            EngineUnderTest(checkpoint, config.engine, CountingDispatcher(groups, transport)) as engine,
        ):
            kernels = engine.kernels
            alone = _in_batches(lambda part: engine.generate(part, output_tokens), prompts, 1)
            uneven = _uneven(prompts)
            uneven_alone = _in_batches(lambda part: engine.generate(part, output_tokens), uneven, 1)
            together = _in_batches(lambda part: engine.generate(part, output_tokens), uneven, batch)
        if config.engine.kv_cache_dtype != "auto":
            plain = config.engine.model_copy(update={"kv_cache_dtype": "auto"})
            with (
                local_experts(checkpoint, groups, getattr(torch, dtype_name), device) as transport,
                EngineUnderTest(checkpoint, plain, CountingDispatcher(groups, transport)) as engine,
            ):
                exact_cache = _in_batches(lambda part: engine.generate(part, output_tokens), prompts, 1)
    output.line("kernels: " + "; ".join(f"{what}: {which}" for what, which in kernels.items()))
    exact, (rounded, rounded_together) = theirs["float32"][0], theirs[dtype_name]
    plain_name, reference_name = f"Manta {dtype_name}", f"transformers {dtype_name}"
    ours = plain_name if exact_cache is None else f"{plain_name}, keys and values {kv_cache_dtype}"
    comparisons = [
        Comparison.of(ours, alone, "transformers float32", exact),
        Comparison.of(reference_name, rounded, "transformers float32", exact),
        Comparison.of(ours, alone, reference_name, rounded),
        *([] if exact_cache is None else [Comparison.of(ours, alone, plain_name, exact_cache)]),
        Comparison.of(f"{ours}, {batch} at a time, of several lengths", together, f"{ours} alone", uneven_alone),
        Comparison.of(f"{reference_name}, {batch} at a time", rounded_together, f"{reference_name} alone", rounded),
    ]
    _draw(comparisons, output)
    output.json(
        {
            "bench": "divergence",
            "model": checkpoint.directory.name,
            "dtype": dtype_name,
            "kv_cache_dtype": kv_cache_dtype,
            "device": device.type,
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "kernels": kernels,
            "machine": machine.to_json(),
            "results": [comparison.to_json() for comparison in comparisons],
        }
    )


def _in_batches(generate: Callable[[list[list[int]]], Tokens], prompts: list[list[int]], size: int) -> Tokens:
    return [tokens for first in range(0, len(prompts), size) for tokens in generate(prompts[first : first + size])]


def _uneven(prompts: list[list[int]]) -> list[list[int]]:
    """The same without up to half of their first tokens: batches of several lengths are computed otherwise."""
    return [prompt[5 * number % (1 + len(prompt) // 2) :] for number, prompt in enumerate(prompts)]


def _draw(comparisons: Sequence[Comparison], output: Output) -> None:
    rows = []
    for one in comparisons:
        firsts = sorted(first for first in one.firsts if first is not None)
        rows.append(
            [
                one.name,
                one.against,
                f"{one.num_equal} of {len(one.firsts)}",
                f"{1e3 * one.rate:.2f}",
                ", ".join(map(str, firsts)) or "-",
            ]
        )
    output.table(
        "where tokens first differ", ["", "against", "equal", "differences per 1000 tokens", "at tokens"], rows
    )
