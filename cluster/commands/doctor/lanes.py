"""What a layer's dispatch costs between processes of this machine, over lanes as they are, without Ray and maths."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import torch

from cluster.commands.doctor.lane_peer import FINGERPRINT
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.dialer import LaneDialer
from experts_service.carriers.lane import LaneTransport
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.wire.address import LaneAddress
from router_service.dispatcher import Dispatcher

HIDDEN = 4096  # Mixtral's
MANY_ROWS = 128
TIMEOUT_S = 20.0
HERE = "here"
_WARM_UP, _MOST, _LONGEST_S = 20, 300, 3.0


def lane_figures() -> dict[str, float]:
    """Of a profile. Raises what goes wrong."""
    with _peers(2) as paths:
        one = _seconds(paths[:1], 1)
        two = _seconds(paths, 1)
        many = _seconds(paths[:1], MANY_ROWS)
        shared = [_seconds(paths[:1], rows, memory=True) for rows in (1, MANY_ROWS)]
    of_group = max(two - one, 1e-6)
    sent = 2 * (MANY_ROWS - 1) * HIDDEN * torch.bfloat16.itemsize  # there and back, one way after the other
    return {
        "lane_dispatch_s": max(one - of_group, 1e-6),
        "lane_group_s": of_group,
        "lane_bandwidth": sent / max(many - one, 1e-6),
        "memory_bandwidth": sent / max(shared[1] - shared[0], 1e-6),
    }


@torch.inference_mode()
def _seconds(paths: list[str], num_rows: int, *, memory: bool = False) -> float:
    """Of a dispatch and combine of so many rows, each to every peer: the median. `memory`: shared with them."""
    addresses = {str(group): LaneAddress(path, "127.0.0.1", 0, HERE, "first") for group, path in enumerate(paths)}
    deployments = {group: Deployment("doctor", str(group)) for group in range(len(paths))}
    table = RoutingTable()
    for group, deployment in deployments.items():
        table.publish(deployment, [Replica(str(group), str(group), "doctor", group, FINGERPRINT)])
    dialer = LaneDialer(
        lambda replica, _: addresses[replica.replica_id],
        secret=_SECRET,
        fingerprint=FINGERPRINT,
        node_id=HERE,
        memory=memory,
    )
    groups = [ExpertGroup(group, (group,)) for group in deployments]
    dispatcher = Dispatcher(groups, LaneTransport(deployments, table, dialer, timeout_s=TIMEOUT_S))
    rows = torch.randn(num_rows, HIDDEN).to(torch.bfloat16)
    experts = torch.arange(len(paths)).repeat(num_rows, 1)  # [T, K]
    weights = torch.full((num_rows, len(paths)), 1.0 / len(paths))
    seconds: list[float] = []
    try:
        deadline = time.perf_counter() + _LONGEST_S
        for turn in range(_WARM_UP + _MOST):
            started = time.perf_counter()
            dispatcher.combine(dispatcher.dispatch(0, rows, experts), weights)
            ended = time.perf_counter()
            if turn >= _WARM_UP:
                seconds.append(ended - started)
            if ended > deadline and len(seconds) >= 5:
                break
    finally:
        dispatcher.close()
    return median(seconds)


_SECRET = secrets.token_hex(32).encode()


@contextmanager
def _peers(number: int) -> Iterator[list[str]]:
    """Where so many of them listen."""
    command = [sys.executable, "-P", "-m", "cluster.commands.doctor.lane_peer", str(HIDDEN)]
    with ExitStack() as stack:
        peers = []
        for _ in range(number):
            peer = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(peer.kill)  # of one that has not ended by itself
            peers.append(peer)
        paths = []
        for peer in peers:
            assert peer.stdin is not None
            assert peer.stdout is not None
            peer.stdin.write(_SECRET.decode() + "\n")
            peer.stdin.flush()
        for peer in peers:
            assert peer.stdout is not None
            path = peer.stdout.readline().strip()
            if not path:
                raise RuntimeError("a process that was to answer over a lane ended")
            paths.append(path)
        yield paths
        for peer in peers:
            assert peer.stdin is not None
            peer.stdin.close()
            peer.wait(TIMEOUT_S)
