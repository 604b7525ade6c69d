"""The other half of `manta bench serve --compare transformers`: `generate` on this machine, in turn with the load.

It runs as many of the load's prompts as are under way at a time, all at once and to the same length, in a process of
its own, with whichever of its implementations is fastest here. The server stays up meanwhile, and costs it what the
server costs at rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.decode.reference import Implementation, Reference, fastest_reference
from cluster.commands.bench.serve.figures import Outcome, Slo, report
from cluster.commands.bench.serve.load import Load
from cluster.config import EngineConfig
from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Comparison:
    """With what, and how often."""

    checkpoint: str  # a directory or a hub id: the model that is served
    pairs: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A load, and the same work by transformers."""

    outcomes: list[Outcome]
    run: Run


class Rival:
    """Transformers with the model that is served."""

    def __init__(self, reference: Reference, implementation: Implementation, prompts: list[list[int]], length: int):
        self.implementation = implementation
        self._reference = reference
        self._prompts = prompts
        self._length = length

    def run(self) -> Run:
        """Greedy, with forced length."""
        return self._reference.generate(self._prompts, self._length, self.implementation)

    def to_json(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Medians of transformers' runs, and of the ratios within pairs; above 1 the server is faster."""
        tokens = len(self._prompts) * self._length
        rates = [tokens / (pair.run.prefill_s + pair.run.decode_s) for pair in pairs]
        ours = [report(pair.outcomes, Slo()) for pair in pairs]
        steps = [pair.run.step_ms for pair in pairs]
        return {
            "experts": self.implementation.experts,
            "attention": self.implementation.attention,
            "pairs": len(pairs),
            "ttft_ms": round(1e3 * median(pair.run.prefill_s for pair in pairs), 3),
            "tpot_ms": round(median(steps), 3),
            "output_tokens_per_s": round(median(rates), 2),
            "tpot_speedup": round(
                median(step / one["tpot_ms"]["p50"] for step, one in zip(steps, ours, strict=True)), 3
            ),
            "throughput_speedup": round(
                median(one["output_tokens_per_s"] / rate for one, rate in zip(ours, rates, strict=True)), 3
            ),
        }


@contextmanager
def opened(comparison: Comparison, load: Load) -> Iterator[Rival]:
    """Loads the model a second time. Raises MantaError for whatever a user can mend."""
    from router_service.assembly import resolve_device

    if load.rate is not None or load.output_tokens < 2:
        raise ConfigError("--compare needs a fixed --concurrency and at least 2 --output-tokens")
    checkpoint = open_checkpoint(resolve_model(comparison.checkpoint))
    architecture, engine = checkpoint.architecture, EngineConfig()
    workload = Workload(load.concurrency or 1, load.prompt_tokens, load.output_tokens)
    dtype, device = compute_dtype(engine.dtype, architecture), resolve_device(engine).type
    with fastest_reference(checkpoint.directory, architecture, dtype, device, workload) as reference:
        prompts = [load.prompt(number) for number in range(workload.num_sequences)]
        yield Rival(reference, reference.fastest(workload), prompts, workload.output_tokens)
