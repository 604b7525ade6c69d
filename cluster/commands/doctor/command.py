"""`manta doctor`: runs the checks that apply, draws or prints what they found. Knows no check by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.commands.bench.machine import this_machine
from cluster.commands.doctor.checks import Check, Result, Status, run_check

if TYPE_CHECKING:
    from rich.console import Console


def run(*, as_json: bool) -> bool:
    """Whether nothing failed."""
    if as_json:
        results = [run_check(check) for check in checks()]
        print(json.dumps(document(results), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        for line in this_machine().lines():
            console.print(line)
        results = [_shown(run_check(check), console) for check in checks()]
        console.print(summary(results))
    return not any(one.status is Status.FAILED for one in results)


def checks() -> Iterator[Check]:
    """In their order. Modules that import torch come when it is their turn."""
    from cluster.commands.doctor import machine

    yield from machine.CHECKS
    import torch

    from cluster.commands.doctor import cpu, model

    yield from cpu.CHECKS
    yield from model.checks(torch.device("cpu"))


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
