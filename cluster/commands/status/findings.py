"""What is wrong with a cluster, in words, and what to do first. Reads a ClusterSnapshot; asks nobody anything.

The worst comes first: what no client gets an answer for, then what is slow, then what only deserves a look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.commands.status.cluster_snapshot import (
    COORDINATOR,
    GATEWAY,
    ApplicationStatus,
    ClusterSnapshot,
    DeploymentStatus,
    NodeStatus,
    ProxyStatus,
)
from cluster.expert_deployments import expert_deployment_name

FULL_CACHE = 0.95  # of the blocks
FULL_DISK = 0.95  # Ray's own, local_fs_capacity_threshold: it spills no object any more
_STARTING, _DELETING = ("DEPLOYING", "NOT_STARTED"), "DELETING"  # Serve's words
_NO_ROOM = "to be scheduled"  # Serve's words for a replica that no node has room for


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    wrong: str  # what it is, and what users feel of it
    first: str  # what to do first


def findings(snapshot: ClusterSnapshot) -> tuple[Finding, ...]:
    """All of them; none where all is well."""
    found = []
    if not snapshot.controller_answers:
        found.append(
            Finding(
                "Serve's controller does not answer, so what runs is not known. Clients are answered as before by what "
                "runs, and what dies is not replaced.",
                "Look at its process (`ps -eo pid,stat,args | grep ServeController`): state T is stopped (`kill -CONT "
                "PID`). Ray starts another when it is killed (`kill -KILL PID`), and what runs goes on meanwhile.",
            )
        )
    models = [application for application in snapshot.applications if application.model]
    if models and GATEWAY not in (application.name for application in snapshot.applications):
        found.append(Finding("No gateway runs: no model can be asked.", "Deploy the configuration again."))
    dead = snapshot.gone
    # One that is deleted ends its streams; one that starts is not missed while another version of its model answers.
    there = [one for one in snapshot.applications if one.status != _DELETING]
    answering = {one.model[0] for one in there if one.model and _is_up(one)}
    starting = [
        one for one in there if one.model and one.model[0] in answering and one.status in _STARTING and not _is_up(one)
    ]
    missed = [one for one in there if one not in starting]
    down = [finding for application in missed for finding in _down(application, dead)]
    slow = [finding for application in missed for finding in _slow(application)]
    waiting = [finding for application in starting for finding in _without_room(application, dead)]
    full = [_full(node) for node in snapshot.nodes if node.alive and (node.disk or 0.0) >= FULL_DISK]
    proxies = [finding for proxy in snapshot.proxies for finding in _proxy(proxy)]
    fewer = [finding for application in missed for finding in _fewer(application, dead)]
    return (*found, *proxies, *down, *full, *slow, *waiting, *fewer)


def _proxy(proxy: ProxyStatus) -> Iterator[Finding]:
    if proxy.answers is False:
        yield Finding(
            f"The proxy of node {proxy.address} does not answer: clients that connect there wait, or are refused.",
            "Look at its process (`ps -eo pid,stat,args | grep haproxy`): state T is stopped (`kill -CONT PID`). "
            "Serve starts another when it is gone.",
        )
    elif proxy.status == "UNHEALTHY":
        yield Finding(
            f"Serve's controller gets no answer from the proxy of node {proxy.address}: it may not learn where "
            "gateways are.",
            "Serve replaces it if that lasts. Its log is proxy_….log among Serve's.",
        )


def _is_up(application: ApplicationStatus) -> bool:
    """Whether each of its parts has a replica."""
    groups = {one.group for one in application.deployments if one.group is not None and one.running}
    return groups == set(application.groups) and any(
        one.running for one in application.deployments if one.name == COORDINATOR
    )


def _down(application: ApplicationStatus, dead: tuple[str, ...]) -> Iterator[Finding]:
    name = application.model[0] if application.model else application.name
    if application.status == "DEPLOY_FAILED":
        why = application.message.strip().splitlines()
        yield Finding(
            f"{name} could not be deployed: {why[-1] if why else 'Serve does not say why'}",
            "Mend that, and deploy it again; docs/troubleshooting.md has the messages.",
        )
        return
    if application.model is None:
        if not any(deployment.running for deployment in application.deployments):
            yield Finding(f"{name} has no replica that runs.", _first(application.deployments, dead))
        if application.silent:
            running = sum(one.running for one in application.deployments)
            yield Finding(
                f"{application.silent} of {running} gateways stand still: the requests that they have wait, "
                + ("and so do all new ones." if application.silent >= running else "and some of the new ones."),
                "Their machine is overloaded, or the process is stopped (`ps -eo pid,stat,args | grep :gateway`, state "
                "T: `kill -CONT PID`). Serve replaces it if that lasts.",
            )
        return
    coordinators = [one for one in application.deployments if one.name == COORDINATOR]
    if not any(one.running for one in coordinators):
        yield Finding(f"{name} has no coordinator: requests get 503.", _first(coordinators, dead))
    for group in application.groups:
        replicas = [one for one in application.deployments if one.group == group]
        if not any(one.running for one in replicas):
            yield Finding(
                f"{name} has no replica of {expert_deployment_name(group)}: its streams wait, new requests get 503.",
                _first(replicas, dead),
            )
        for one in replicas:
            yield from _shards(name, one)
    unheard = {one.name for one in application.deployments if one.silent or one.restarting}
    for unreachable in sorted({one for stats in application.coordinators for one in stats.missing_experts}):
        if unreachable not in unheard and any(
            one.name == unreachable and one.running for one in application.deployments
        ):
            yield Finding(
                f"{unreachable} of {name} runs, and a coordinator gets no answer from it: its streams wait.",
                "Look in the coordinator's log for 'no lane to'. It loads still, a network policy or a firewall is "
                "between them, or the lanes' secret is not the same. Runbook: MantaExpertDown.",
            )


def _shards(model: str, group: DeploymentStatus) -> Iterator[Finding]:
    """Those of one group, on one tier, that run as far as Serve knows."""
    alone = "streams wait for it, and new requests get 503." if group.running == 1 else "others of the group answer."
    if group.silent:
        if group.running == 1:
            alone = (
                "what has rows there ends in 503 after experts.expert_timeout_s, and new requests get 503 from then."
            )
        yield Finding(
            f"{group.silent} of {group.running} replicas of {group.name} of {model} do not answer. If it is the shard, "
            f"{alone}",
            "Their machine is overloaded, or the shard or what watches it is stopped (`ps -eo pid,stat,args | grep -E "
            "'ExpertShard|:expert-'`, state T: `kill -CONT PID`). By itself a shard is restarted after five minutes, "
            "and at once with `kill -KILL PID`.",
        )
    if group.restarting:
        yield Finding(
            f"{group.restarting} of {group.running} shards of {group.name} of {model} are being restarted: {alone}",
            "Wait while weights are read. The end of the shard's log says why it died.",
        )


def _full(node: NodeStatus) -> Finding:
    return Finding(
        f"Node {node.address}: {node.disk:.0%} of the disk with Ray's session is used. Ray puts no more objects there, "
        "and when it is full, logs end and no process may start.",
        "Make room there: sessions of servers that have ended, or what else grows. docs/troubleshooting.md says where.",
    )


def _without_room(application: ApplicationStatus, dead: tuple[str, ...]) -> Iterator[Finding]:
    """A version that starts beside the one that answers, and may do so for ever."""
    if application.model and any(_NO_ROOM in one.message for one in application.deployments):
        yield Finding(
            f"A version of {application.model[0]} finds no room to start; another one answers meanwhile.",
            _first(application.deployments, dead),
        )


def _fewer(application: ApplicationStatus, dead: tuple[str, ...]) -> Iterator[Finding]:
    """What has lost a replica while others of the same kind answer: clients would feel the next loss."""

    def answer(lost: DeploymentStatus) -> bool:
        of_group = lost.group is not None
        return any(
            one.running for one in application.deployments if one is lost or (of_group and one.group == lost.group)
        )

    if lost := [one for one in application.deployments if one.status == "UNHEALTHY" and answer(one)]:
        name = application.model[0] if application.model else application.name
        yield Finding(
            f"{name} has lost replicas of {', '.join(one.name for one in lost)}; those that are left answer.",
            _first(lost, dead),
        )


def _first(deployments: list[DeploymentStatus] | tuple[DeploymentStatus, ...], dead: tuple[str, ...]) -> str:
    """Where to look for replicas that do not run."""
    messages = " ".join(one.message for one in deployments)
    lost = f" Nodes that are gone: {', '.join(dead)}." if dead else ""
    if _NO_ROOM in messages:
        return f"No node has room for it: add one, or give back what something else took (`ray status`).{lost}"
    if any(one.status == "UNHEALTHY" and one.replicas for one in deployments):
        return (
            "One that ran is gone, and Serve starts another: wait while weights are read, and look in its log for why, "
            f"or if that lasts.{lost}"
        )
    if any(one.replicas for one in deployments):
        return f"It starts, or stops: wait while weights are read, and look in its log if that lasts.{lost}"
    return f"Look in the log of Serve's controller for why none is started.{lost}"


def _slow(application: ApplicationStatus) -> Iterator[Finding]:
    if application.model is None:
        return
    name = application.model[0]
    running = any(one.name == COORDINATOR and one.running for one in application.deployments)
    if application.stats_error and running:
        yield Finding(
            f"A coordinator of {name} does not say how it is: {application.stats_error}."
            + ("" if application.coordinators else " Its streams stand still, and new requests wait."),
            "Its machine is overloaded, or the process is stopped (`ps -eo pid,stat,args | grep :coordinator`, state "
            "T: `kill -CONT PID`). Serve replaces it if that lasts.",
        )
    waiting = sum(stats.num_requests_waiting for stats in application.coordinators)
    full = sum(stats.num_kv_blocks_used >= FULL_CACHE * stats.num_kv_blocks > 0 for stats in application.coordinators)
    if waiting:
        why = (
            f"the cache of {full} of {len(application.coordinators)} coordinators is full"
            if full
            else "batches are full"
        )
        yield Finding(
            f"{waiting} requests for {name} wait: {why}.",
            "If it lasts: more coordinators (coordinator_scaling), or a larger cache (engine.kv_cache_gib). "
            "`manta status --watch` says whether experts are busy instead.",
        )
    if failed := sum(stats.failed_steps_total for stats in application.coordinators):
        yield Finding(
            f"{failed} steps of {name} have ended sequences with an error since its coordinators started.",
            "Look in the coordinators' logs for 'a step failed', and report what is not explained there.",
        )
