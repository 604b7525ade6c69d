"""The roof: composes the Serve applications of a configuration. Decides layout; starts nothing and shows nothing.

gateway                     HTTP and gRPC doors, the only application with a route
<model>-<fingerprint8>      one per model version: coordinator, expert-0 … expert-<G-1>
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from cluster.architecture import compute_dtype
from cluster.checkpoint import Checkpoint
from cluster.config import GatewayConfig, MantaConfig, ModelConfig
from cluster.messages import ModelCard
from cluster.placement import ExpertGroup, plan_groups

GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a Ray cluster has to give."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model, laid out on a cluster."""

    config: ModelConfig  # nothing in it is "auto" any more
    checkpoint: Checkpoint
    groups: tuple[ExpertGroup, ...]
    gpus_per_shard: float
    gpus_per_coordinator: float

    @property
    def application(self) -> str:
        """The name of its Serve application."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.config.name)
        return f"{name}-{self.checkpoint.fingerprint[:8]}"

    @property
    def expert_deployments(self) -> tuple[str, ...]:
        """Names of the experts' deployments: none when the coordinator runs them itself."""
        if self.config.experts.transport == "local":
            return ()
        return tuple(f"expert-{group.index}" for group in self.groups)


def plan_model(config: ModelConfig, checkpoint: Checkpoint, cluster: Cluster) -> ModelPlan:
    """Resolve everything that is "auto". Raises ConfigError."""
    architecture = checkpoint.architecture
    groups = plan_groups(config.experts.groups, architecture.num_experts, cluster.num_gpus, cluster.num_cpus)
    on_gpu = config.engine.device == "cuda" or (config.engine.device == "auto" and cluster.num_gpus > 0)
    gpus = config.experts.gpus_per_shard if config.experts.gpus_per_shard is not None else 1.0
    engine = config.engine.model_copy(
        update={
            "dtype": compute_dtype(config.engine.dtype, architecture),
            "device": "cuda" if on_gpu else "cpu",
            "max_model_len": config.engine.max_model_len or architecture.max_position_embeddings,
        }
    )
    return ModelPlan(
        config=config.model_copy(update={"engine": engine}),
        checkpoint=checkpoint,
        groups=groups,
        gpus_per_shard=gpus if on_gpu else 0.0,
        gpus_per_coordinator=1.0 if on_gpu else 0.0,
    )


def model_card(plan: ModelPlan) -> ModelCard:
    """What the gateway is told of a model."""
    checkpoint, config = plan.checkpoint, plan.config
    assert config.engine.max_model_len is not None, "a plan has no open settings"
    return ModelCard(
        name=config.name,
        aliases=config.aliases,
        application=plan.application,
        directory=str(checkpoint.directory),
        layout=checkpoint.layout,
        fingerprint=checkpoint.fingerprint,
        max_model_len=config.engine.max_model_len,
        vocab_size=checkpoint.architecture.vocab_size,
        eos_token_ids=checkpoint.architecture.eos_token_ids,
        created=int(time.time()),
        default_temperature=checkpoint.default_temperature,
        default_top_p=checkpoint.default_top_p,
        deployments=("coordinator", *plan.expert_deployments),
    )


def model_application(plan: ModelPlan, gateway: GatewayConfig) -> serve.Application:
    """Coordinator and experts of one model version."""
    from experts_service.service import expert_deployment
    from experts_service.shard import ShardSpec
    from router_service.coordinator import coordinator_deployment

    config, checkpoint = plan.config, plan.checkpoint
    engine, experts = config.engine, config.experts
    assert engine.dtype != "auto", "a plan has no open settings"
    assert engine.device != "auto", "a plan has no open settings"
    shards = [
        expert_deployment(
            ShardSpec(
                application=plan.application,
                directory=str(checkpoint.directory),
                fingerprint=checkpoint.fingerprint,
                group=group.index,
                experts=group.experts,
                num_groups=len(plan.groups),
                dtype=engine.dtype,
                device=engine.device,
                num_threads=experts.num_threads,
                gpus=plan.gpus_per_shard,
                load_timeout_s=experts.load_timeout_s,
            )
        )
        for group in plan.groups
        if plan.expert_deployments
    ]
    return coordinator_deployment(
        str(checkpoint.directory),
        checkpoint.fingerprint,
        engine,
        experts,
        plan.groups,
        *shards,
        num_replicas=config.num_coordinators,
        gpus=plan.gpus_per_coordinator,
        request_timeout_s=gateway.request_timeout_s,
        # The engine's own bound is what refuses; Serve's only has to be beyond it.
        max_ongoing_requests=engine.max_num_seqs + engine.max_waiting + 1000,
    )


def run_targets(config: MantaConfig, plans: tuple[ModelPlan, ...]) -> list[Any]:
    """All applications for `serve.run_many`; the gateway first, so that /health answers while models load."""
    from gateway.service import gateway_application

    cards = tuple(model_card(plan) for plan in plans)
    gateway = serve.RunTarget(gateway_application(config.gateway, cards), name=GATEWAY, route_prefix="/")
    models = [
        serve.RunTarget(model_application(plan, config.gateway), name=plan.application, route_prefix=None)
        for plan in plans
    ]
    return [gateway, *models]


def demo_config() -> MantaConfig:
    """What `manta serve` serves without a model: the embedded demo model."""
    from cluster.demo_model import DIRECTORY

    return MantaConfig(models=(ModelConfig(name="manta-demo", path=str(DIRECTORY)),))


def directory_config(model: str, directory: Path) -> MantaConfig:
    """What `manta serve MODEL` serves: the one model, called by its own name."""
    return MantaConfig(models=(ModelConfig(name=model.rstrip("/").rsplit("/", 1)[-1], path=str(directory)),))
