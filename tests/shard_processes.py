"""Shards in processes of their own, without Ray: forked from one that has imported what all of them need.

The shard, its lanes and its weights are those of the actor. One is there in a second, where an actor takes ten.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.dialer import LaneDialer
from experts_service.carriers.lane import LaneTransport
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.shard import ExpertShard, ShardSpec
from experts_service.wire.address import LaneAddress
from experts_service.wire.secret import read_lane_secret
from tests.experts_service.shards import shard_spec

START_S = 300.0
NODE = "here"
IMPORTED = (
    "torch",
    "experts_service.kernels.experts",
    "experts_service.transformers_backend.experts",
    "tests.shard_processes",
)


class ShardProcess:
    """One shard."""

    def __init__(self, spec: ShardSpec) -> None:
        """It loads meanwhile: `address` waits."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self._address: LaneAddress | None = None

    @property
    def address(self) -> LaneAddress:
        """Where it listens."""
        if self._address is None:
            assert self._connection.poll(START_S), "the shard did not load"
            path, host, port = self._connection.recv()
            self._address = LaneAddress(path, host, port, NODE, str(self._process.pid), 0)
        return self._address

    def kill(self) -> None:
        """At once, as a machine that fails does."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, spec: ShardSpec) -> None:
    shard = ExpertShard(spec)
    assert shard._lanes is not None
    connection.send((str(shard._lanes.path), shard._host, shard._lanes.port))
    connection.poll(None)  # until the test has ended


class ShardProcesses:
    """A shard for each group of a checkpoint, and a second one for the first."""

    def __init__(self, checkpoint: Checkpoint, groups: Sequence[ExpertGroup], secret_file: Path) -> None:
        self.groups = tuple(groups)
        self._checkpoint, self._secret_file = checkpoint, secret_file
        self.processes: Mapping[str, ShardProcess] = {
            f"shard-{group.index}-{number}": ShardProcess(self._spec(group))
            for number, group in enumerate((*groups, groups[0]))
        }

    def _spec(self, group: ExpertGroup) -> ShardSpec:
        own: dict[str, Any] = {
            "num_groups": len(self.groups),
            "dtype": "float32",
            "model_impl": self._checkpoint.model_impl,
            "lane_secret_file": str(self._secret_file),
        }
        return shard_spec(self._checkpoint, group, "families", **own)

    def transport(self) -> LaneTransport:
        """Lanes to all of them."""
        fingerprint = self._checkpoint.fingerprint
        table = RoutingTable()
        deployments = {group.index: Deployment("families", f"expert-{group.index}") for group in self.groups}
        for group in self.groups:
            names = [name for name in self.processes if name.split("-")[1] == str(group.index)]
            replicas = [Replica(name, name, "none", group.index, fingerprint) for name in names]
            table.publish(deployments[group.index], replicas)
        dialer = LaneDialer(
            lambda replica, _: self.processes[replica.actor].address,
            secret=read_lane_secret(self._secret_file),
            fingerprint=fingerprint,
            node_id=NODE,
        )
        for process in self.processes.values():
            assert process.address
        return LaneTransport(deployments, table, dialer, timeout_s=60.0)


@contextmanager
def shard_processes(
    checkpoint: Checkpoint, groups: Sequence[ExpertGroup], secret_file: Path
) -> Iterator[ShardProcesses]:
    """They have ended when the block has."""
    shards = ShardProcesses(checkpoint, groups, secret_file)
    try:
        yield shards
    finally:
        for process in shards.processes.values():
            process.kill()
