"""Lanes to real shard actors: the bits of local experts, and rows that outlive the process that was computing them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.errors import ExpertUnavailable
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.auto import AutoTransport
from experts_service.carriers.dialer import LaneDialer, ask_shard
from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.local import LocalTransport
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.kernels.experts import Experts
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.shard import start_shard
from experts_service.shard_handles import ShardHandles
from experts_service.wire.secret import read_lane_secret
from router_service.dispatcher import Dispatcher
from tests.experts_service.shards import shard_spec

pytestmark = pytest.mark.usefixtures("ray_cluster")

NAMESPACE = "manta-lane-test"
GROUPS = (ExpertGroup(0, (0, 3)), ExpertGroup(1, (2, 1)))
DEPLOYMENTS = {group.index: Deployment("lanes", f"expert-{group.index}") for group in GROUPS}


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secret") / "lane_secret"
    file.touch(0o600)
    file.write_text("s" * 64)
    return file


def start(checkpoint: Checkpoint, group: ExpertGroup, name: str, secret_file: Path | None) -> Any:
    secret = None if secret_file is None else str(secret_file)
    spec = shard_spec(checkpoint, group, "lanes", lane_secret_file=secret)
    return start_shard(spec, name, namespace=NAMESPACE)


@pytest.fixture(scope="module")
def shards(checkpoint: Checkpoint, secret_file: Path) -> Iterator[dict[str, Any]]:
    started = {f"lane-shard-{group.index}": start(checkpoint, group, f"lane-shard-{group.index}", secret_file)
               for group in GROUPS}  # fmt: skip
    started["without"] = start(checkpoint, GROUPS[0], "without", None)
    ray.get([shard.stats.remote() for shard in started.values()], timeout=60)
    yield started
    for shard in started.values():
        ray.kill(shard)


def table(checkpoint: Checkpoint, first: str = "lane-shard-0") -> RoutingTable:
    published = RoutingTable()
    for group, actor in enumerate((first, "lane-shard-1")):
        published.publish(DEPLOYMENTS[group], [Replica(actor, actor, NAMESPACE, group, checkpoint.fingerprint)])
    return published


def lane(
    checkpoint: Checkpoint,
    secret_file: Path,
    known: RoutingTable,
    node_id: str | None = None,
    *,
    memory: bool = False,
) -> LaneTransport:
    dialer = LaneDialer(
        partial(ask_shard, ShardHandles(known, DEPLOYMENTS.values())),
        secret=read_lane_secret(secret_file),
        fingerprint=checkpoint.fingerprint,
        node_id=node_id or ray.get_runtime_context().get_node_id(),
        memory=memory,
    )
    return LaneTransport(DEPLOYMENTS, known, dialer, timeout_s=30.0)


def assert_equal_to_local(remote: Dispatcher, checkpoint: Checkpoint, num_rows: int) -> None:
    here = LocalTransport(
        {
            group.index: Experts.load(checkpoint, group.experts, dtype=torch.bfloat16, device=torch.device("cpu"))
            for group in GROUPS
        }
    )
    local = Dispatcher(GROUPS, here)
    architecture = checkpoint.architecture
    for layer in range(architecture.num_layers):
        rows = torch.randn(num_rows, architecture.hidden_size).bfloat16()
        experts = torch.rand(num_rows, architecture.num_experts).topk(2).indices
        weights = torch.rand(num_rows, 2)
        expected = local.combine(local.dispatch(layer, rows, experts), weights)
        assert torch.equal(remote.combine(remote.dispatch(layer, rows, experts), weights), expected)


@pytest.mark.parametrize("node_id", [None, "another node"], ids=["unix", "tcp"])
def test_lanes_give_the_bits_of_local_experts(
    checkpoint: Checkpoint, shards: dict[str, Any], secret_file: Path, node_id: str | None
) -> None:
    transport = lane(checkpoint, secret_file, table(checkpoint), node_id)
    for num_rows in (1, 3, 200):
        assert_equal_to_local(Dispatcher(GROUPS, transport), checkpoint, num_rows)
    transport.close()


def test_rows_are_run_though_their_shard_was_killed(
    checkpoint: Checkpoint, shards: dict[str, Any], secret_file: Path
) -> None:
    """No replica is left: the dispatch holds while Ray restarts the shard, asks for its new address and dials again."""
    transport = lane(checkpoint, secret_file, table(checkpoint))
    remote = Dispatcher(GROUPS, transport)
    assert_equal_to_local(remote, checkpoint, 4)
    before = ray.get(shards["lane-shard-0"].lane_address.remote(), timeout=60)
    os.kill(_process(before.path), signal.SIGKILL)
    assert_equal_to_local(remote, checkpoint, 4)
    after = ray.get(shards["lane-shard-0"].lane_address.remote(), timeout=60)
    assert after.incarnation != before.incarnation
    transport.close()


def test_rows_in_memory_are_run_though_their_shard_is_stopped_and_killed(
    checkpoint: Checkpoint, shards: dict[str, Any], secret_file: Path
) -> None:
    """Rows that shards run without Python are counted like others."""

    def rows_run() -> int:
        names = ("lane-shard-0", "lane-shard-1")
        return sum(sum(ray.get(shards[name].stats.remote(), timeout=60).rows_per_expert) for name in names)

    transport = lane(checkpoint, secret_file, table(checkpoint), memory=True)
    remote = Dispatcher(GROUPS, transport)
    before = rows_run()
    for _ in range(5):
        assert_equal_to_local(remote, checkpoint, 1)
    assert rows_run() - before == 5 * checkpoint.architecture.num_layers * 2
    process = _process(ray.get(shards["lane-shard-0"].lane_address.remote(), timeout=60).path)
    os.kill(process, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (process, signal.SIGCONT)).start()
    assert_equal_to_local(remote, checkpoint, 1)
    os.kill(process, signal.SIGKILL)
    for _ in range(2):
        assert_equal_to_local(remote, checkpoint, 1)
    transport.close()


def test_a_shard_without_lanes_is_reached_through_the_object_store(
    checkpoint: Checkpoint, shards: dict[str, Any], secret_file: Path
) -> None:
    known = table(checkpoint, first="without")
    lanes = lane(checkpoint, secret_file, known)
    with pytest.raises(ExpertUnavailable):
        ray.get(shards["without"].lane_address.remote(), timeout=60)
    handles = ShardHandles(known, DEPLOYMENTS.values())
    object_store = ObjectStoreTransport(DEPLOYMENTS, known, handles, fingerprint=checkpoint.fingerprint, timeout_s=30.0)
    auto = AutoTransport(lanes, object_store)
    assert_equal_to_local(Dispatcher(GROUPS, auto), checkpoint, 5)
    auto.close()


def _process(path: str) -> int:
    """The one that listens at a Unix socket."""
    import psutil

    for process in psutil.process_iter():
        try:
            if any(
                c.laddr == path or c.laddr == path.replace(".sock", ".new") for c in process.net_connections("unix")
            ):
                return process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError("nobody listens there")
