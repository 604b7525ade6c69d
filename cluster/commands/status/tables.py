"""Draws a ClusterSnapshot for a terminal. Collects nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.commands.status.cluster_snapshot import COORDINATOR, ApplicationStatus, ClusterSnapshot, DeploymentStatus
from cluster.commands.status.findings import findings

BAR_WIDTH = 32  # cells of the busiest expert's bar
MOST_EXPERTS = 32  # of more the busiest are shown

_STYLES = {
    "RUNNING": "green",
    "HEALTHY": "green",
    "alive": "green",
    "UNHEALTHY": "red",
    "DEPLOY_FAILED": "red",
    "dead": "red",
}


def draw(snapshot: ClusterSnapshot, console: Console) -> None:
    """What is wrong, nodes, then every application; below a model's, its queue, KV cache and experts."""
    console.print(Text(f"Ray cluster at {snapshot.address}", style="bold"))
    _draw_findings(snapshot, console)
    console.print(_nodes(snapshot))
    if not snapshot.applications and snapshot.controller_answers:
        console.print(Text("Nothing is served on it yet; `manta serve` starts something.", style="yellow"))
    for application in snapshot.applications:
        _draw_application(application, console)


def _draw_findings(snapshot: ClusterSnapshot, console: Console) -> None:
    found = findings(snapshot)
    if snapshot.applications and not found:
        console.print(Text("All is well.", style="green"))
    for finding in found:
        # The terminal wraps them: a command that is cut by a line's end cannot be copied.
        console.print(Text(f"✗ {finding.wrong}", style="red"), soft_wrap=True)
        console.print(Text(f"  {finding.first}"), soft_wrap=True)
    if found and snapshot.logs:
        logs = f"Logs of this machine: {snapshot.logs} (docs/logs.md says what lines mean)"
        console.print(Text(logs, style="dim"), soft_wrap=True)


def _nodes(snapshot: ClusterSnapshot) -> Table:
    table = _table("node", "state", "CPUs", "GPUs", "disk")
    for node in snapshot.nodes:
        if node.alive:
            disk = "-" if node.disk is None else f"{node.disk:.0%}"
            table.add_row(Text(node.address), _state("alive"), f"{node.cpus:g}", f"{node.gpus:g}", disk)
    for address in snapshot.gone:
        table.add_row(Text(address), _state("dead"), "-", "-", "-")
    return table


def _draw_application(application: ApplicationStatus, console: Console) -> None:
    title = Text("\n")
    if application.model:
        name, fingerprint = application.model
        groups = len(application.groups)
        title.append(f"model {name}", style="bold").append(f" · {fingerprint} · ")
        title.append(f"{groups} expert group{'' if groups == 1 else 's'} · " if groups else "")
    else:
        title.append(f"application {application.name}", style="bold").append(" · ")
    console.print(title.append(_state(application.status)))
    if application.revision:
        console.print(Text(f"revision {application.revision} of the hub"))
    if application.message:
        console.print(Text(application.message, style="red" if "FAILED" in application.status else "yellow"))
    console.print(_deployments(application))
    for deployment in application.deployments:
        if deployment.message:
            console.print(Text(f"{deployment.name}: {deployment.message}", style="yellow"))
    if application.coordinators:
        console.print(_coordinators(application))
        if application.rows_per_expert:
            console.print(_rows_per_expert(application.rows_per_expert))
    if application.stats_error:
        console.print(Text(application.stats_error, style="yellow"))


def _deployments(application: ApplicationStatus) -> Table:
    """Coordinator first, then the groups by index, then any other."""
    table = _table("deployment", "status", "replicas")
    for deployment in sorted(
        application.deployments, key=lambda d: (d.name != COORDINATOR, d.group is None, d.group or 0, d.name)
    ):
        table.add_row(Text(deployment.name), _state(deployment.status), _replicas(deployment))
    return table


def _replicas(deployment: DeploymentStatus) -> Text:
    """`2 running`, or `1 running, 1 starting`."""
    states = sorted(deployment.replicas.items(), key=lambda pair: (pair[0] != "RUNNING", pair[0]))
    return Text(", ".join(f"{count} {state.lower()}" for state, count in states) or "none")


def _coordinators(application: ApplicationStatus) -> Table:
    table = _table("coordinator", "running", "waiting", "KV blocks", "tokens in/out", "preempted")
    for number, stats in enumerate(application.coordinators):
        share = 100 * stats.num_kv_blocks_used / max(stats.num_kv_blocks, 1)
        table.add_row(
            str(number),
            str(stats.num_requests_running),
            str(stats.num_requests_waiting),
            f"{stats.num_kv_blocks_used}/{stats.num_kv_blocks} ({share:.0f} %)",
            f"{stats.prompt_tokens_total}/{stats.generation_tokens_total}",
            str(stats.preemptions_total),
        )
    return table


def _rows_per_expert(rows: tuple[int, ...]) -> Table:
    table = _table("expert", "rows", "share", "")
    total, busiest = sum(rows), max(rows, default=0)
    shown = range(len(rows)) if len(rows) <= MOST_EXPERTS else sorted(range(len(rows)), key=lambda one: -rows[one])
    for expert in shown[:MOST_EXPERTS]:
        count = rows[expert]
        cells = round(BAR_WIDTH * count / busiest) if busiest else 0
        share = f"{100 * count / total:.1f} %" if total else "-"
        table.add_row(str(expert), str(count), share, Text("█" * cells, style="cyan"))
    if others := [rows[expert] for expert in shown[MOST_EXPERTS:]]:
        share = f"{100 * sum(others) / total:.1f} %" if total else "-"
        table.add_row(f"{len(others)} others", str(sum(others)), share, "")
    return table


def _state(state: str) -> Text:
    return Text(state.lower(), style=_STYLES.get(state, "yellow"))


def _table(*columns: str) -> Table:
    """Words align left, figures right."""
    words = {"node", "state", "deployment", "status", "replicas", "coordinator", "expert", ""}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=column != "replicas")
    return table
