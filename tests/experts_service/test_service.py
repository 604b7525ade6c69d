"""Groups as real Serve deployments: membership reaches another process, dead shards return, shutting down kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import serve

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.client import ExpertPool
from experts_service.kernels.experts import Experts
from experts_service.routing_table import TABLE, Deployment
from experts_service.service import NAMESPACE, ExpertService, expert_deployment
from experts_service.shard.shard import ShardSpec
from router_service.dispatcher import Dispatcher
from tests.experts_service.shards import shard_spec
from tests.programs import said_by
from tests.waiting import wait_for

APPLICATION = "experts-test"
GROUPS = (ExpertGroup(0, (0, 1)), ExpertGroup(1, (2, 3)))


def holder() -> serve.Deployment:
    """Stands for the coordinator: the ingress of the application, which Serve gives the handles."""

    class Holder:  # local, so that it travels by value: the cluster's processes know nothing of tests
        def __init__(self, *handles: Any) -> None:
            self._handles = handles

    return serve.deployment(Holder).options(name="holder", ray_actor_options={"num_cpus": 0.01})


@pytest.fixture(scope="module")
def pool(ray_cluster: str, checkpoint: Checkpoint) -> Iterator[ExpertPool]:
    application = holder().bind(
        *(expert_deployment(shard_spec(checkpoint, group, APPLICATION, dtype="float32")) for group in GROUPS)
    )
    serve.run(application, name=APPLICATION, route_prefix=None)
    pool = ExpertPool([serve.get_deployment_handle(f"expert-{g.index}", APPLICATION) for g in GROUPS])
    pool.connect(timeout_s=60.0)
    yield pool
    pool.close()
    names = [r.actor for g in GROUPS for r in TABLE.replicas(Deployment(APPLICATION, f"expert-{g.index}"))]
    serve.delete(APPLICATION)
    for name in names:
        wait_for(lambda name=name: not alive(name), 120, f"the end of {name}")


def alive(name: str) -> bool:
    try:
        ray.get(ray.get_actor(name, namespace=NAMESPACE).stats.remote(), timeout=60)
    except (ValueError, ray.exceptions.RayActorError):
        return False
    return True


def test_the_pool_knows_each_group_and_its_rows_come_back(pool: ExpertPool, checkpoint: Checkpoint) -> None:
    assert pool.missing() == []
    experts = {
        g.index: Experts.load(checkpoint, g.experts, dtype=torch.float32, device=torch.device("cpu")) for g in GROUPS
    }
    here = Dispatcher(GROUPS, LocalTransport(experts))
    there = Dispatcher(GROUPS, pool.transport(checkpoint.fingerprint, timeout_s=30.0))
    rows = torch.randn(1, checkpoint.architecture.hidden_size)
    chosen, weights = torch.tensor([[0, 3]]), torch.tensor([[0.25, 0.75]])
    expected = here.combine(here.dispatch(1, rows, chosen), weights)
    assert torch.equal(there.combine(there.dispatch(1, rows, chosen), weights), expected)


def test_a_killed_shard_comes_back_under_the_same_replica(pool: ExpertPool, checkpoint: Checkpoint) -> None:
    deployment = Deployment(APPLICATION, "expert-1")
    (replica,) = TABLE.replicas(deployment)
    shard = ray.get_actor(replica.actor, namespace=NAMESPACE)
    pid = ray.get(shard.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    epoch = TABLE.epoch
    os.kill(pid, signal.SIGKILL)
    there = Dispatcher(GROUPS, pool.transport(checkpoint.fingerprint, timeout_s=60.0))
    rows, chosen = torch.randn(2, checkpoint.architecture.hidden_size), torch.tensor([[2, 3], [3, 2]])
    there.combine(there.dispatch(0, rows, chosen), torch.full((2, 2), 0.5))
    assert TABLE.epoch >= epoch + 2  # suspected, and trusted again
    (after,) = TABLE.replicas(deployment)
    assert (after.replica_id, after.suspected) == (replica.replica_id, False)
    assert pool.missing() == []
    status = serve.status().applications[APPLICATION].deployments["expert-1"]
    assert status.status == "HEALTHY"


def test_a_suspected_shard_that_lives_is_trusted_again(pool: ExpertPool) -> None:
    """It was the only one, so no row would ever have found out: nothing is admitted while a group is missing."""
    deployment = Deployment(APPLICATION, "expert-0")
    (replica,) = TABLE.replicas(deployment)
    TABLE.suspect(deployment, replica.replica_id, TABLE.epoch)
    assert pool.missing() == ["expert-0"]
    wait_for(lambda: pool.missing() == [], 120, "the shard to be trusted")


def test_a_shard_that_is_stuck_is_restarted(pool: ExpertPool, checkpoint: Checkpoint) -> None:
    """It is alive, so neither Ray nor Serve would do anything."""

    class Impatient(ExpertService):  # local, so that it travels by value
        async def __init__(self, spec: ShardSpec) -> None:  # type: ignore[misc]
            from experts_service import service

            service.STUCK_S, service.PROBE_TIMEOUT_S = 3.0, 1.0
            await super().__init__(spec)

    name = "experts-stuck"
    spec = shard_spec(checkpoint, GROUPS[0], name, dtype="float32")
    handle = serve.run(serve.deployment(Impatient).options(name=spec.name).bind(spec), name=name, route_prefix=None)
    try:
        first = handle.stats.remote().result(timeout_s=60).incarnation
        metadata = handle.record_replica_metadata.remote().result(timeout_s=60)
        shard = ray.get_actor(metadata["actor"], namespace=NAMESPACE)
        pid = ray.get(shard.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        os.kill(pid, signal.SIGSTOP)

        def incarnation() -> str:
            with suppress(Exception):  # it is being restarted
                return str(handle.stats.remote().result(timeout_s=10).incarnation)
            return first

        wait_for(lambda: incarnation() != first, 300, "another shard")
        wait_for(lambda: not psutil.pid_exists(pid), 60, "the end of the one that was stuck")
    finally:
        serve.delete(name, _blocking=False)


def test_a_process_that_only_supervises_does_not_import_torch() -> None:
    """One replica of each group is such a process: 150 MB and two seconds of CPU apart."""
    modules = said_by("experts_service.imported_by", "experts_service.service").split()
    assert "experts_service.service" in modules
    assert "torch" not in modules
