"""Rows through real shard actors: the bits of local experts, refusals, and what happens when a shard dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.quantization.rounding import Rounding
from cluster.errors import ExpertUnavailable
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.kernels.experts import Experts
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.shard import start_shard
from experts_service.shard_handles import ShardHandles
from router_service.dispatcher import Dispatcher
from tests.experts_service.shards import shard_spec
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("ray_cluster")

NAMESPACE = "manta-test"
GROUPS = (ExpertGroup(0, (0, 3)), ExpertGroup(1, (2, 1)))
DEPLOYMENTS = {group.index: Deployment("model", f"expert-{group.index}") for group in GROUPS}


@pytest.fixture(scope="module")
def shards(checkpoint: Checkpoint) -> Iterator[dict[int, Any]]:
    """One actor per group, with the default two threads' share of a small machine: one thread each."""
    started = {}
    for group in GROUPS:
        spec = shard_spec(checkpoint, group, "model")
        started[group.index] = start_shard(spec, f"shard-{group.index}", namespace=NAMESPACE)
    ray.get([shard.stats.remote() for shard in started.values()], timeout=60)
    yield started
    for shard in started.values():
        ray.kill(shard)


@pytest.fixture
def table(checkpoint: Checkpoint) -> RoutingTable:
    table = RoutingTable()
    for group, deployment in DEPLOYMENTS.items():
        table.publish(deployment, [replica(group, f"shard-{group}", checkpoint.fingerprint)])
    return table


def replica(group: int, actor: str, fingerprint: str) -> Replica:
    return Replica(f"replica-of-{actor}", actor, NAMESPACE, group, fingerprint)


def remote(table: RoutingTable, fingerprint: str, timeout_s: float = 30.0, **options: Any) -> Dispatcher:
    handles = ShardHandles(table, DEPLOYMENTS.values())
    transport = ObjectStoreTransport(
        DEPLOYMENTS, table, handles, fingerprint=fingerprint, timeout_s=timeout_s, **options
    )
    return Dispatcher(GROUPS, transport)


def local(checkpoint: Checkpoint) -> Dispatcher:
    experts = {
        group.index: Experts.load(checkpoint, group.experts, dtype=torch.bfloat16, device=torch.device("cpu"))
        for group in GROUPS
    }
    return Dispatcher(GROUPS, LocalTransport(experts))


def random_batch(checkpoint: Checkpoint, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [T, D], experts [T, K] and gate weights [T, K]."""
    architecture = checkpoint.architecture
    torch.manual_seed(num_rows)
    rows = torch.randn(num_rows, architecture.hidden_size, dtype=torch.bfloat16)
    weights, experts = torch.rand(num_rows, architecture.num_experts).softmax(-1).topk(architecture.top_k)
    return rows, experts, weights


def batch_of_group_1(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of 20 rows: no other group has to answer before a deadline that a busy machine may miss."""
    rows, experts, weights = random_batch(checkpoint, 20)
    return rows, torch.tensor(GROUPS[1].experts).expand_as(experts).contiguous(), weights


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("shards", "one_thread")
@pytest.mark.parametrize("num_rows", [1, 3, 40, 4000], ids=lambda n: f"{n} rows")
def test_equals_local_to_the_bit_inline_and_through_the_store(
    checkpoint: Checkpoint, table: RoutingTable, num_rows: int
) -> None:
    rows, experts, weights = random_batch(checkpoint, num_rows)
    here, there = local(checkpoint), remote(table, checkpoint.fingerprint)
    for layer in range(checkpoint.architecture.num_layers):
        expected = here.combine(here.dispatch(layer, rows, experts), weights)
        answer = there.combine(there.dispatch(layer, rows, experts), weights)
        assert torch.equal(answer, expected)


@pytest.mark.usefixtures("shards")
def test_another_checkpoint_is_refused_by_the_shard(checkpoint: Checkpoint, table: RoutingTable) -> None:
    rows, experts, weights = random_batch(checkpoint, 2)
    other = remote(table, "0123456789abcdef")
    with pytest.raises(ExpertUnavailable, match=r"expert group \d serves the checkpoint .*asked for 01234567"):
        other.combine(other.dispatch(0, rows, experts), weights)


@pytest.mark.usefixtures("shards")
def test_a_shard_that_rounds_otherwise_than_its_tier_is_refused_and_the_other_tier_answers(
    checkpoint: Checkpoint, table: RoutingTable, shards: dict[int, Any]
) -> None:
    """The first refusal ended the step, whoever else could have answered."""
    rounding = Rounding("int8", 16, "experts")
    rounded = checkpoint.rounded(rounding)
    spec = shard_spec(rounded, GROUPS[1], "model", rounding=rounding)
    second = start_shard(spec, "rounded", namespace=NAMESPACE)
    other = dataclasses.replace(replica(1, "rounded", rounded.fingerprint), tier="expert-1-tier1")
    rows, experts, weights = random_batch(checkpoint, 20)

    def answers(of_tiers: dict[str, str]) -> tuple[list[torch.Tensor], int]:
        table.publish(DEPLOYMENTS[1], [other, replica(1, "shard-1", checkpoint.fingerprint)])
        dispatcher = remote(table, checkpoint.fingerprint, timeout_s=60.0, of_tiers=of_tiers)
        found = [dispatcher.combine(dispatcher.dispatch(0, rows, experts), weights) for _ in range(6)]
        return found, sum(ray.get(second.stats.remote(), timeout=60).rows_per_expert)

    try:
        here = local(checkpoint)
        plain = here.combine(here.dispatch(0, rows, experts), weights)
        refused, rows_of_second = answers({})
        assert all(torch.equal(answer, plain) for answer in refused)
        assert rows_of_second == 0
        table.publish(DEPLOYMENTS[1], [])
        mixed, rows_of_second = answers({"expert-1-tier1": rounded.fingerprint})
        assert rows_of_second > 0
        kinds = {answer.numpy(force=True).tobytes() for answer in map(torch.Tensor.float, mixed)}
        assert len(kinds) == 2, "of plain weights and of rounded ones"
        assert all(torch.allclose(answer, plain, atol=0.05) for answer in mixed)
    finally:
        ray.kill(second)


@pytest.mark.usefixtures("shards")
def test_a_group_without_replica_is_named_at_the_deadline(checkpoint: Checkpoint, table: RoutingTable) -> None:
    table.publish(DEPLOYMENTS[1], [])
    rows, experts, weights = batch_of_group_1(checkpoint)
    there = remote(table, checkpoint.fingerprint, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(ExpertUnavailable, match="expert group 1 did not answer") as raised:
        there.combine(there.dispatch(0, rows, experts), weights)
    assert raised.value.group == 1
    assert time.monotonic() - started < 20


@pytest.mark.usefixtures("shards")
def test_rows_go_to_another_replica_when_the_chosen_one_has_no_actor(
    checkpoint: Checkpoint, table: RoutingTable
) -> None:
    fingerprint = checkpoint.fingerprint
    table.publish(DEPLOYMENTS[1], [replica(1, "nobody", fingerprint), replica(1, "shard-1", fingerprint)])
    rows, experts, weights = random_batch(checkpoint, 20)
    there = remote(table, fingerprint)
    for _ in range(3):
        there.combine(there.dispatch(0, rows, experts), weights)
    assert [(r.actor, r.suspected) for r in table.replicas(DEPLOYMENTS[1])] == [("shard-1", False), ("nobody", True)]


@pytest.mark.usefixtures("shards")
def test_rows_that_cannot_be_put_into_the_store_are_nobodys(
    checkpoint: Checkpoint, table: RoutingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full store fails that dispatch, and the next one is as any other."""
    rows, experts, weights = random_batch(checkpoint, 4000)
    there = remote(table, checkpoint.fingerprint)
    before = there.combine(there.dispatch(0, rows, experts), weights)

    def full(value: object) -> Any:
        raise ray.exceptions.ObjectStoreFullError

    with monkeypatch.context() as patched:
        patched.setattr(ray, "put", full)
        with pytest.raises(ray.exceptions.ObjectStoreFullError):
            there.dispatch(0, rows, experts)
    there.dispatch(0, rows, experts).close()  # the step failed elsewhere: nobody waits for it
    assert torch.equal(there.combine(there.dispatch(0, rows, experts), weights), before)


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("num_rows", [2, 4000])
@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "always"])
def test_an_answer_that_is_not_finite_is_asked_of_another_replica(
    checkpoint: Checkpoint, table: RoutingTable, shards: dict[int, Any], num_rows: int, times: int
) -> None:
    """NaN of a damaged replica went into the sum, as lanes had never let it."""
    name = f"damaged-{num_rows}-{times}"
    damaged = start_shard(shard_spec(checkpoint, GROUPS[1], "model"), name, namespace=NAMESPACE)

    def damage(shard: Any, times: int = times) -> None:
        compute = shard._compute

        def compute_damaged(*arguments: Any) -> Any:
            nonlocal times
            times -= 1
            return compute(*arguments) * (float("nan") if times >= 0 else 1.0)

        shard._compute = compute_damaged

    ray.get(damaged.__ray_call__.remote(damage), timeout=60)
    table.publish(DEPLOYMENTS[1], [replica(1, actor, checkpoint.fingerprint) for actor in (name, "shard-1")])
    rows, experts, weights = random_batch(checkpoint, num_rows)
    here, there = local(checkpoint), remote(table, checkpoint.fingerprint)
    expected = here.combine(here.dispatch(0, rows, experts), weights)
    try:
        for _ in range(4):
            assert torch.equal(there.combine(there.dispatch(0, rows, experts), weights), expected)
    finally:
        ray.kill(damaged)


def test_two_replicas_share_the_rows_and_a_stopped_one_is_hedged(
    checkpoint: Checkpoint, table: RoutingTable, shards: dict[int, Any]
) -> None:
    """Only lanes did either; over the object store a stopped shard held a step until its deadline."""
    second = start_shard(shard_spec(checkpoint, GROUPS[1], "model"), "second", namespace=NAMESPACE)
    table.publish(DEPLOYMENTS[1], [replica(1, actor, checkpoint.fingerprint) for actor in ("second", "shard-1")])
    here, there = local(checkpoint), remote(table, checkpoint.fingerprint, timeout_s=60.0)
    routes = there._transport._routes  # type: ignore[attr-defined]
    pid = shard_pid(second)
    try:
        wait_for(lambda: len(routes.reachable(1)) == 2, 60, "both actors")
        for num_rows in (4000, 4):
            rows, experts, weights = random_batch(checkpoint, num_rows)
            expected = here.combine(here.dispatch(0, rows, experts), weights)
            for _ in range(4):
                assert torch.equal(there.combine(there.dispatch(0, rows, experts), weights), expected)
        counts = [sum(ray.get(one.stats.remote(), timeout=60).rows_per_expert) for one in (second, shards[1])]
        assert min(counts) > 1000, counts
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        for _ in range(4):
            assert torch.equal(there.combine(there.dispatch(0, rows, experts), weights), expected)
        assert time.monotonic() - started < 15, "promised a second or two"
    finally:
        os.kill(pid, signal.SIGCONT)
        ray.kill(second)


def test_a_killed_shard_restarts_loaded_and_the_step_completes(
    checkpoint: Checkpoint, table: RoutingTable, shards: dict[int, Any]
) -> None:
    rows, experts, weights = random_batch(checkpoint, 20)
    there = remote(table, checkpoint.fingerprint, timeout_s=60.0)
    before = there.combine(there.dispatch(0, rows, experts), weights)
    first = ray.get(shards[0].stats.remote(), timeout=60).incarnation
    os.kill(shard_pid(shards[0]), signal.SIGKILL)
    after = there.combine(there.dispatch(0, rows, experts), weights)
    assert torch.equal(before, after)
    stats = ray.get(shards[0].stats.remote(), timeout=60)
    assert stats.incarnation != first
    assert sum(stats.rows_per_expert) > 0


def shard_pid(shard: Any) -> int:
    pid: Callable[[Any], int] = lambda _: os.getpid()  # noqa: E731
    return int(ray.get(shard.__ray_call__.remote(pid), timeout=60))


def test_a_stopped_shard_is_named_at_the_deadline(
    checkpoint: Checkpoint, table: RoutingTable, shards: dict[int, Any]
) -> None:
    rows, experts, weights = batch_of_group_1(checkpoint)
    there = remote(table, checkpoint.fingerprint, timeout_s=0.5)
    pid = shard_pid(shards[1])
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ExpertUnavailable, match=r"expert group 1 did not answer for layer 1 within 0.5 s"):
            there.combine(there.dispatch(1, rows, experts), weights)
    finally:
        os.kill(pid, signal.SIGCONT)
