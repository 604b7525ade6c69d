"""Checks of how an engine drives a GPU: that its host waits for nothing, and that replayed steps say the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.doctor.checks import Check, Finding, failed, good, not_applicable, told
from cluster.commands.doctor.model import TOLERANCE, generate
from cluster.demo_model import DIRECTORY as DEMO
from cluster.messages import TokenChunk
from router_service.engine import Engine
from router_service.scheduling.scheduler import Batch

PROMPTS = ((1, 5, 9), (1, 7, 11, 13))


def checks(device: torch.device) -> tuple[Check, ...]:
    """Of a GPU."""
    return (
        Check(
            f"waits on {device}",
            "A step that only decodes is launched without waiting for the device.",
            lambda: waits(device),
        ),
        Check(
            f"graphs on {device}",
            "A step that is replayed as a CUDA graph says what it says launch by launch.",
            lambda: captured(device),
        ),
        Check(
            f"graphs for experts elsewhere on {device}",
            "So do the pieces between two dispatches, whose experts are on the CPU here.",
            lambda: captured(device, elsewhere=True),
        ),
    )


def waits(device: torch.device) -> Finding:
    """Steps of the embedded model, in which torch raises where the host would wait."""
    watch = _Watch()
    generate(open_checkpoint(DEMO), device, torch.bfloat16, PROMPTS)  # compiles what is compiled once
    try:
        generate(open_checkpoint(DEMO), device, torch.bfloat16, PROMPTS, prepare=watch.over)
    except Exception:
        if watch.error is None:
            raise
    if watch.error is not None:
        return failed(
            f"a step waits: {told(watch.error)}",
            "it is slower than it could be, and right: report it, with what `manta doctor --json` prints",
        )
    return good(f"{watch.num_steps} steps, none of which waits")


class _Watch:
    """Over the steps of one engine."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.error: Exception | None = None
        self._sizes: set[int] = set()  # of batches that have been decoded; the first of each may compile and capture
        self._is_strict = False

    def over(self, engine: Engine) -> None:
        """Before it starts."""
        runner, sampler = engine.model_runner, engine.sampler
        forward, launch = runner.forward, sampler.launch

        def forward_strictly(batch: Any) -> Any:
            only_decodes = all(scheduled.num_tokens == 1 for scheduled in batch)
            self._is_strict = only_decodes and len(batch) in self._sizes
            self.num_steps += self._is_strict
            if only_decodes:
                self._sizes.add(len(batch))
            return self._strictly(lambda: forward(batch))

        runner.forward = forward_strictly  # type: ignore[method-assign]
        sampler.launch = lambda *arguments: self._strictly(lambda: launch(*arguments))  # type: ignore[method-assign]

    def _strictly(self, work: Callable[[], Any]) -> Any:
        if not self._is_strict:
            return work()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return work()
        except Exception as error:
            self.error = self.error or error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(device: torch.device, *, elsewhere: bool = False) -> Finding:
    """The same tokens, as likely, from steps that are replayed and from steps that are not."""
    checkpoint = open_checkpoint(DEMO)
    graphs = _Graphs()
    eager_s: list[float] = []
    captured_s: list[float] = []
    launched = partial(generate, checkpoint, device, torch.bfloat16, PROMPTS, elsewhere=elsewhere)
    eager = launched(_noting(eager_s), cuda_graphs="off")
    replayed = launched(_noting(captured_s), prepare=graphs.over)
    if not graphs.num_steps:
        return not_applicable("steps are not captured here")
    if graphs.num_eager:
        return failed(
            f"{graphs.num_eager} of {graphs.num_steps} steps could not be captured",
            "they are run one launch after the other, slower and right; the log says why. engine.cuda_graphs: off",
        )
    tokens, logprobs = _said(eager)
    other_tokens, other_logprobs = _said(replayed)
    off = max((abs(one - other) for one, other in zip(logprobs, other_logprobs, strict=False)), default=0.0)
    found = (
        f"{graphs.num_steps} steps, log-probabilities differ by {off:.2g} at most; {1e3 * median(captured_s):.2f} ms "
        f"captured and {1e3 * median(eager_s):.2f} launch by launch"
    )
    if tokens != other_tokens or not off <= TOLERANCE[torch.bfloat16]:
        return failed(found, "set engine.cuda_graphs: off, and report it with what `manta doctor --json` prints")
    return good(found)


def _noting(seconds: list[float]) -> Callable[[float, Batch], object]:
    return lambda of_step, _: seconds.append(of_step)


def _said(answers: list[list[TokenChunk]]) -> tuple[list[int], list[float]]:
    """Tokens, and how likely each was."""
    chunks = [chunk for of_one in answers for chunk in of_one]
    return (
        [token for chunk in chunks for token in chunk.token_ids],
        [one.token_logprob for chunk in chunks for one in chunk.logprobs or ()],
    )


class _Graphs:
    """Over the graphs of one engine."""

    def __init__(self) -> None:
        self.num_steps = self.num_eager = 0

    def over(self, engine: Engine) -> None:
        """Before it starts."""
        runner = engine.model_runner
        replay = runner.graphs
        if replay is None:
            return

        def counted(*arguments: Any) -> torch.Tensor | None:
            logits = replay(*arguments)
            self.num_steps += 1
            self.num_eager += logits is None
            return logits

        runner.graphs = counted  # type: ignore[assignment]
