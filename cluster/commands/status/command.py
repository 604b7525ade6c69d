"""`manta status`: inspects a running cluster, once or again and again, and draws or prints what it saw."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing, nullcontext, suppress
from datetime import datetime
from typing import Any

from cluster.commands.status.cluster_inspection import inspect_cluster
from cluster.commands.status.findings import findings

WATCH_INTERVAL_S = 1.0


def run(address: str, *, as_json: bool, kernels: bool) -> None:
    """With `kernels` only what computes is drawn. Raises Unavailable when no cluster answers, before it prints."""
    if as_json:
        print(json.dumps(document(address), indent=2))
        return
    snapshot = inspect_cluster(address, with_kernels=kernels)
    from rich.console import Console

    from cluster.commands.status.kernel_tables import draw_kernels
    from cluster.commands.status.tables import draw

    if kernels:
        draw_kernels(snapshot, Console(highlight=False))
    else:
        draw(snapshot, Console(highlight=False))


def document(address: str) -> dict[str, Any]:
    """All of it, for JSON. Raises Unavailable when no cluster answers."""
    snapshot = inspect_cluster(address, with_kernels=True)
    return snapshot.document() | {"findings": [dataclasses.asdict(finding) for finding in findings(snapshot)]}


def watch_load(address: str) -> None:
    """Show the load of every expert until Ctrl-C: in a terminal in place, else one below the other.

    Raises Unavailable when no cluster answers, or it stops answering.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from cluster.commands.cluster_connection import watch_cluster
    from cluster.commands.status.load_inspection import inspect_load
    from cluster.commands.status.load_tables import draw_load
    from cluster.commands.status.model_load import load_between

    with suppress(KeyboardInterrupt), closing(watch_cluster(address, inspect_load, WATCH_INTERVAL_S)) as samples:
        console = Console(highlight=False)
        before = next(samples)
        first = draw_load([load_between(one, one) for one in before])
        with Live(first, console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
            for after in samples:
                known = {sample.model: sample for sample in before}
                drawn = draw_load([load_between(known.get(sample.model, sample), sample) for sample in after])
                if live is not None:
                    live.update(Group(drawn, Text("Ctrl-C ends this.", style="dim")), refresh=True)
                else:
                    console.print(Text(f"{datetime.now():%H:%M:%S}"), drawn)
                before = after
