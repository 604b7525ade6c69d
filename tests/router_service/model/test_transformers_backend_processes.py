"""Families by transformers' code with their experts in Ray's actors, one of which is killed.

All other families: test_families_in_processes, whose processes are not Ray's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.commands.local_ray.start import start_local_ray
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.dialer import LaneDialer, ask_shard
from experts_service.carriers.lane import LaneTransport
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.shard import start_shard
from experts_service.shard_handles import ShardHandles
from experts_service.wire.secret import read_lane_secret
from router_service.dispatcher import Dispatcher
from tests.experts_service.shards import shard_spec
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.transformers_families import generated, prompt, write_family
from tests.widened_checkpoints import by_transformers, write_fp8, write_mxfp4

pytestmark = pytest.mark.long

NAMESPACE = "manta-transformers-test"
NEW_TOKENS = 64
LENGTHS = (40, 5, 23)
STEPS_BEFORE_THE_KILL = 20


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    start_local_ray(200 * 2**20, namespace=NAMESPACE)
    yield
    ray.shutdown()


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "lane_secret"
    file.touch(0o600)
    file.write_text("s" * 64)
    return file


def start(checkpoint: Checkpoint, groups: list[ExpertGroup], secret_file: Path) -> dict[str, Any]:
    """A shard for each group, and a second one for the first."""
    shards = {}
    for group in (*groups, groups[0]):
        name = f"{checkpoint.fingerprint[:8]}-{len(groups)}-{group.index}-{len(shards)}"
        spec = shard_spec(
            checkpoint,
            group,
            "transformers",
            num_groups=len(groups),
            dtype="float32",
            model_impl=checkpoint.model_impl,
            lane_secret_file=str(secret_file),
        )
        shards[name] = start_shard(spec, name, namespace=NAMESPACE)
    return shards


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize(("family", "number"), [("gpt_oss", 4), ("llama4_text", 2)])
def test_experts_in_processes_say_the_same_and_one_may_die(
    tmp_path: Path, secret_file: Path, family: str, number: int
) -> None:
    """The ids are those of transformers in one process, before a shard is killed and while another takes its rows."""
    say_the_same(tmp_path, secret_file, write_family(tmp_path / "model", family), number)


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize("write", [write_mxfp4, write_fp8])
def test_experts_that_are_widened_say_the_same(
    tmp_path: Path, secret_file: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """gpt-oss in MXFP4, DeepSeek-V3 in FP8: each process widens its own."""
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    model = by_transformers(tmp_path / "model", torch.float32, monkeypatch).float()
    say_the_same(tmp_path, secret_file, model, 2)


def say_the_same(tmp_path: Path, secret_file: Path, model: Any, number: int) -> None:
    """Of the checkpoint that is in tmp_path / "model"."""
    checkpoint = open_checkpoint(tmp_path / "model")
    size = checkpoint.architecture.num_experts // number
    groups = [ExpertGroup(index, tuple(range(index * size, (index + 1) * size))) for index in range(number)]
    deployments = {group.index: Deployment("transformers", f"expert-{group.index}") for group in groups}
    shards = start(checkpoint, groups, secret_file)
    try:
        pids = dict(zip(shards, ray.get([_pid(shard) for shard in shards.values()], timeout=300), strict=True))
        table = RoutingTable()
        for group in groups:
            names = [name for name in shards if name.split("-")[2] == str(group.index)]
            table.publish(
                deployments[group.index],
                [Replica(name, name, NAMESPACE, group.index, checkpoint.fingerprint) for name in names],
            )
        dialer = LaneDialer(
            partial(ask_shard, ShardHandles(table, deployments.values())),
            secret=read_lane_secret(secret_file),
            fingerprint=checkpoint.fingerprint,
            node_id=ray.get_runtime_context().get_node_id(),
        )
        dispatcher = Dispatcher(groups, LaneTransport(deployments, table, dialer, timeout_s=60.0))
        bench = Bench(tmp_path / "model", dtype="float32", dispatcher=dispatcher, max_num_batched_tokens=17)
        expected = [generated(model, prompt(length, length), NEW_TOKENS) for length in LENGTHS]
        assert bench.run(*requests()) == expected
        disturbed = requests()
        bench.add(*disturbed)
        for _ in range(STEPS_BEFORE_THE_KILL):
            bench.engine.step()
        os.kill(pids[next(iter(shards))], signal.SIGKILL)
        assert bench.run(*disturbed[:0]) == []
        assert [bench.token_ids(request) for request in disturbed] == expected
        assert not bench.errors
        dispatcher.close()
    finally:
        for shard in shards.values():
            ray.kill(shard)


def requests() -> list[Any]:
    return [
        make_request(prompt(length, length), max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
        for length in LENGTHS
    ]


def _pid(shard: Any) -> Any:
    return shard.__ray_call__.remote(lambda _: os.getpid())
