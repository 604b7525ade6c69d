"""Checks of how an engine's steps drive a GPU: that its host never waits for the device where a step only decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.doctor.checks import Check, Finding, failed, good, told
from cluster.commands.doctor.model import generate
from cluster.demo_model import DIRECTORY as DEMO
from router_service.engine import Engine

PROMPTS = ((1, 5, 9), (1, 7, 11, 13))


def checks(device: torch.device) -> tuple[Check, ...]:
    """Of a GPU."""
    return (
        Check(
            f"waits on {device}",
            "A step that only decodes is launched without waiting for the device.",
            lambda: waits(device),
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
