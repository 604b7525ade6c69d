"""`manta doctor`: runs the checks that apply, draws or prints what they found. Knows no check by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.bench.machine import this_machine
from cluster.commands.doctor.checks import Check, Result, Status, run_check

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from cluster.commands.doctor.profile import Profile


def run(*, as_json: bool, model: str | None = None, profile: Path | None = None, short: bool = False) -> bool:
    """Whether nothing failed. `profile`: where to write what was measured. Raises ConfigError where it cannot be."""
    examination = Examination(model, short=short, profiles=profile is not None)
    if as_json:
        results = [run_check(check) for check in examination.checks()]
        print(json.dumps(document(results), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for line in this_machine().lines():
            console.print(line)
        results = [_shown(run_check(check), console) for check in examination.checks()]
        console.print(summary(results))
    if profile is not None and examination.profile is not None:
        examination.profile.write(profile)
    return not any(one.status is Status.FAILED for one in results)


class Examination:
    """Which checks apply. Modules that import torch come when it is their turn."""

    def __init__(self, model: str | None = None, *, short: bool = False, profiles: bool = False) -> None:
        """`model`: one to look at. `short`: GPUs alone. `profiles`: costs are measured as well."""
        self._model = model
        self._short = short
        self._profiles = profiles
        self.profile: Profile | None = None

    def checks(self) -> Iterator[Check]:
        """In their order."""
        from cluster.commands.doctor import machine

        if not self._short:
            yield from machine.CHECKS
        import torch

        from cluster.commands.doctor import cpu, gpu, kernels, model, steps

        cpu_device, card = torch.device("cpu"), _card()
        if not self._short:
            yield from cpu.CHECKS
            yield from kernels.checks(cpu_device)
            yield from model.checks(cpu_device)
        yield gpu.DRIVER
        if card is not None:
            yield from gpu.checks(card)
            yield from kernels.checks(card)
            yield from model.checks(card)
            yield from steps.checks(card)
        if self._model is not None:
            from cluster.commands.doctor.checkpoint import Model

            yield from Model(self._model).checks()
        if self._profiles:
            from cluster.commands.doctor.profile import Profile

            self.profile = Profile(card)
            yield from self.profile.checks()


def _card() -> torch.device | None:
    """The first GPU, if torch reaches one."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def document(results: list[Result]) -> dict[str, object]:
    """As JSON has it."""
    return {
        "machine": this_machine().to_json(),
        "ok": not any(one.status is Status.FAILED for one in results),
        "checks": [one.document() for one in results],
    }


def summary(results: list[Result]) -> str:
    """The last line."""
    counts = {status: sum(one.status is status for one in results) for status in Status}
    return ", ".join(f"{counts[status]} {status.mark}" for status in Status)


def _shown(result: Result, console: Console) -> Result:
    console.print(f"{result.status.mark} {result.name}: {result.found}")
    console.print(f"    {result.meaning}", style="dim")
    if result.advice:
        console.print(f"    To do: {result.advice}.", style="bold")
    return result
