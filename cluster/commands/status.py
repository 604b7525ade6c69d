"""`manta status`: inspects a running cluster and draws or prints what it saw."""

from __future__ import annotations

from cluster.commands.cluster_inspection import inspect_cluster


def run(address: str, as_json: bool) -> None:
    """Raises Unavailable when no cluster answers, before anything is printed."""
    snapshot = inspect_cluster(address)
    if as_json:
        print(snapshot.to_json())
        return
    from rich.console import Console

    from cluster.commands.status_tables import draw

    draw(snapshot, Console(highlight=False))
