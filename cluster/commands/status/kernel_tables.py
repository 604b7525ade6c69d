"""Draws which kernels compute in each process of each model. Collects nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.commands.status.cluster_snapshot import ApplicationStatus, ClusterSnapshot
from cluster.telemetry.kernels import ModelKernels, ProcessKernels


def draw_kernels(snapshot: ClusterSnapshot, console: Console) -> None:
    """A table for each model, below it what was measured, and what differs."""
    models = [one for one in snapshot.applications if one.model is not None]
    if not models:
        console.print(Text("No model is served here.", style="yellow"))
    for application in models:
        _draw_model(application, console)


def _draw_model(application: ApplicationStatus, console: Console) -> None:
    name, fingerprint = application.model or ("", "")
    kernels = application.kernels or ModelKernels({})
    console.print(Text("\n").append(f"model {name}", style="bold").append(f" · {fingerprint}"))
    console.print(_processes(kernels))
    for line in _in_words(kernels):
        console.print(Text(line))
    for line in _measured(kernels):
        console.print(Text(line, style="dim"))
    for deployment in kernels.mixed:
        said = f"{deployment}: its replicas compute by different kernels, and a token may hang on which one computed it"
        console.print(Text(said, style="yellow"))
    for deployment, replicas in kernels.deployments.items():
        if not replicas:
            console.print(Text(f"{deployment}: no replica answered", style="yellow"))


def _processes(kernels: ModelKernels) -> Table:
    """A line for each kind of process, as far as 80 columns go."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("process", no_wrap=True)
    table.add_column("replicas", justify="right", no_wrap=True)
    for column in ("matmuls", "dtype", "device", "batch-invariant"):
        table.add_column(column, no_wrap=True)
    for deployment, replicas in kernels.deployments.items():
        for one in kernels.distinct(deployment):
            number = sum(other.identity == one.identity for other in replicas)
            table.add_row(
                deployment,
                str(number),
                one.matmuls,
                one.dtype,
                " ".join(filter(None, (one.device, one.vectors))),
                "yes" if one.batch_invariant else "no",
            )
    return table


def _in_words(kernels: ModelKernels) -> list[str]:
    """What has names too long for a column, a line for all processes that are alike in it."""
    told: dict[str, list[str]] = {}
    for deployment in kernels.deployments:
        for one in kernels.distinct(deployment):
            names = {"attention": one.attention, "sampling": one.sampling, "weights": one.weights}
            if said := "; ".join(f"{what} {name}" for what, name in names.items() if name):
                told.setdefault(said, []).append(deployment)
    return [f"{', '.join(dict.fromkeys(deployments))}: {said}" for said, deployments in told.items()]


def _measured(kernels: ModelKernels) -> list[str]:
    """A line for each kind of machine: processes of one machine share what was measured."""
    told: dict[tuple[object, ...], ProcessKernels] = {}
    for replicas in kernels.deployments.values():
        for one in replicas:
            if one.speeds:
                told[(one.device, one.speeds)] = one
    return [
        f"{one.device}, ms of {', '.join(map(str, one.rows))} rows on one thread: "
        + "; ".join(f"{name} {' '.join(f'{1e3 * s:.2f}' for s in seconds)}" for name, seconds in one.speeds)
        for one in told.values()
    ]
