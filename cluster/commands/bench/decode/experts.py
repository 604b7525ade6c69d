"""The experts of `manta bench decode`: in this process, or as the deployments that `manta serve` would make.

Each is a context manager that yields the transport to them and ends everything that it started.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.bench.decode.cores import Cores
from cluster.commands.local_ray.start import start_local_ray
from cluster.config import GatewayConfig, ModelConfig
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.kernels.selection import select
from experts_service.loaded_experts import load_experts
from experts_service.transport import Transport

OBJECT_STORE_BYTES = 512 * 2**20  # rows of large batches; no weights


@contextmanager
def local_experts(
    checkpoint: Checkpoint, groups: tuple[ExpertGroup, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Transport]:
    """Loaded here, as a coordinator with `transport: local` does."""
    kernel = select(dtype, device).kernel
    yield LocalTransport(
        {
            group.index: load_experts(checkpoint, group.experts, dtype=dtype, device=device, kernel=kernel)
            for group in groups
        }
    )


@contextmanager
def deployed_experts(checkpoint: Checkpoint, config: ModelConfig, cores: Cores | None) -> Iterator[Transport]:
    """In processes of their own, on a Ray cluster of our own without dashboard and proxies, on `cores` if given."""
    import ray
    from ray import serve

    from cluster.deploy.app import describe_cluster, expert_applications, plan_model, with_lane_secret
    from experts_service.client import ExpertPool

    pool, started = None, []
    try:
        with cores.started_for_shards() if cores else nullcontext():
            start_local_ray(OBJECT_STORE_BYTES)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            plan = plan_model(config, checkpoint, describe_cluster(ray.nodes()))
            serve.start(proxy_location="Disabled")
            settings = with_lane_secret(plan.config.experts)
            # This process takes the place of the coordinator that they would be bound to.
            targets = [
                serve.RunTarget(application, name=f"bench-{name}", route_prefix=None)
                for name, application in expert_applications(plan, settings, GatewayConfig()).items()
            ]
            started = [target.name for target in targets]
            serve.run_many(targets)
            handles = [serve.get_deployment_handle(name, f"bench-{name}") for name in plan.expert_deployments]
            pool = ExpertPool(handles)
            pool.connect(settings.load_timeout_s)
        yield pool.transport(
            checkpoint.fingerprint,
            settings.expert_timeout_s,
            name=settings.transport,
            lane_secret_file=settings.lane_secret_file,
            spread_over_cores=settings.spread_over_cores,
            device=torch.device("cuda") if plan.config.engine.device == "cuda" and settings.rows_on_gpus else None,
        )
    finally:
        if pool is not None:
            pool.close()
        for name in started:
            serve.delete(name)
        ray.shutdown()
