"""The `serveConfigV2` document of a configuration, for `serve deploy` and RayService, and the builders that it names.

    application            args: what a process is          deployments: how many there are
    gateway                gateway, models                  gateway: num_replicas
    <model>-<version>      model, gateway's deadline        coordinator, expert-0 … : num_replicas or autoscaling_config

Serve restarts every process of an application whose args changed, and none when only numbers under `deployments` did:
whoever scales `expert-3` there touches nothing else. The document is made without a cluster to look at, and without
the weights where the configuration says `version` and `experts.groups`. The builders run on the cluster, where the
weights are.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.hub import EMBEDDED, is_directory, resolve_model
from cluster.config import GatewayConfig, MantaConfig, ModelConfig
from cluster.deploy.app import (
    GATEWAY,
    Cluster,
    ModelPlan,
    application_name,
    check_applications,
    check_doors,
    check_scaled_groups,
    check_tokenizer,
    model_application,
    model_card,
    named_deployments,
    plan_model,
    without_numbers,
)
from cluster.errors import CheckpointError, ConfigError
from cluster.planning.placement import Node
from cluster.planning.scaling_policy import replica_options

if TYPE_CHECKING:
    from ray.serve import Application

_PLENTY = 2**50  # bytes, of a cluster that takes whatever is laid out; the autoscaler or the operator adds nodes


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def document(self) -> dict[str, Any]:
        """JSON, without what is the default."""
        return self.model_dump(mode="json", exclude_defaults=True)


class ModelArguments(_Arguments):
    """A model version, without the numbers that `deployments` has."""

    model: ModelConfig  # with a version, a device and groups
    fingerprint: str | None = None  # of the checkpoint that was read for the document; another is refused


class ModelApplicationArguments(ModelArguments):
    """Of `build_model`. The two are the gateway's settings that a coordinator has to know."""

    request_timeout_s: float
    otlp_endpoint: str | None = None


class GatewayArguments(_Arguments):
    """Of `build_gateway`."""

    gateway: GatewayConfig
    models: tuple[ModelArguments, ...]


def serve_config(config: MantaConfig) -> dict[str, Any]:
    """The document, as `ServeDeploySchema` takes it. Raises ConfigError for what is left open."""
    from gateway.service import grpc_options, http_options

    check_doors(config.gateway)
    models = [_settle(model) for model in config.models]
    check_applications((one.model.name, _application(one.model)) for one in models)
    gateway = config.gateway
    http, grpc = http_options(gateway), grpc_options(gateway)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": http.host, "port": http.port, "request_timeout_s": http.request_timeout_s},
        "grpc_options": {
            "port": grpc.port,
            "grpc_servicer_functions": list(grpc.grpc_servicer_functions),
            "request_timeout_s": grpc.request_timeout_s,
            "enable_reflection": grpc.enable_reflection,
        },
        "applications": [_gateway_entry(gateway, models)]
        + [_model_entry(gateway, settled, model) for settled, model in zip(models, config.models, strict=True)],
    }


def build_gateway(args: dict[str, Any]) -> Application:
    """Serve calls this on the cluster."""
    from gateway.service import gateway_application

    arguments = GatewayArguments.model_validate(args)
    cards = tuple(model_card(_plan(model)) for model in arguments.models)
    application: Application = gateway_application(arguments.gateway, cards)
    return application


def build_model(args: dict[str, Any]) -> Application:
    """Serve calls this on the cluster."""
    arguments = ModelApplicationArguments.model_validate(args)
    gateway = GatewayConfig(request_timeout_s=arguments.request_timeout_s, otlp_endpoint=arguments.otlp_endpoint)
    return model_application(_plan(arguments), gateway)


def _settle(model: ModelConfig) -> ModelArguments:
    """What the model is, whoever builds it and on whatever cluster."""
    if model.engine.device == "auto":
        raise ConfigError(f"models: {model.name!r}: engine.device: say cpu or cuda; there is no cluster to look at")
    settled = without_numbers(model)
    experts = settled.experts
    if is_directory(model.path) or model.path in EMBEDDED:
        plan = _plan(ModelArguments(model=settled))
        check_scaled_groups(model.experts, len(plan.groups))
        update: dict[str, Any] = {"version": model.version or plan.checkpoint.fingerprint[:8]}
        if plan.expert_deployments:
            groups = tuple(group.experts for group in plan.groups)
            update["experts"] = experts.model_copy(update={"groups": groups})
        return ModelArguments(model=settled.model_copy(update=update), fingerprint=plan.checkpoint.fingerprint)
    if model.version is None:
        raise ConfigError(f"models: {model.name!r}: version: say one; {model.path} cannot be read here")
    if experts.groups == "auto" and experts.transport != "local":
        raise ConfigError(
            f"models: {model.name!r}: experts.groups: say which; {model.path} cannot be read here "
            "(for a dense model, say experts.transport: local)"
        )
    check_scaled_groups(model.experts, 0 if experts.groups == "auto" else len(experts.groups))
    return ModelArguments(model=settled)


def _plan(arguments: ModelArguments) -> ModelPlan:
    """Laid out on as many nodes as it takes. Raises CheckpointError when the weights are not those of the document."""
    model = arguments.model
    checkpoint = open_checkpoint(resolve_model(model.path, model.revision), model.model_impl).rounded(
        model.engine.rounding
    )
    if arguments.fingerprint not in (None, checkpoint.fingerprint):
        raise CheckpointError(
            f"{checkpoint.directory} has the fingerprint {checkpoint.fingerprint[:8]}…, and the Serve config was made "
            f"for {str(arguments.fingerprint)[:8]}…"
        )
    check_tokenizer(checkpoint)
    most = max([tier.gpus for tier in model.experts.tiers], default=model.experts.gpus_per_shard or 0)
    reserves = model.engine.device == "cuda" or most > 0
    gpus = (checkpoint.architecture.num_experts + 1) * ceil(most or 1) if reserves else 0
    return plan_model(model, checkpoint, Cluster(1, (Node("any", _PLENTY, (_PLENTY,) * gpus),)))


def _application(model: ModelConfig) -> str:
    assert model.version is not None, "a settled model has a version"
    return application_name(model.name, model.version)


def _gateway_entry(gateway: GatewayConfig, models: list[ModelArguments]) -> dict[str, Any]:
    settled = gateway.model_copy(update={"num_replicas": 1, "scaling": None})
    arguments = GatewayArguments(gateway=settled, models=tuple(models))
    return {
        "name": GATEWAY,
        "route_prefix": "/",
        "import_path": "cluster.deploy.serve_config:build_gateway",
        "args": arguments.document(),
        "deployments": [{"name": GATEWAY, **replica_options(gateway.replicas)}],
    }


def _model_entry(gateway: GatewayConfig, arguments: ModelArguments, config: ModelConfig) -> dict[str, Any]:
    model = arguments.model
    whole = ModelApplicationArguments(
        model=model,
        fingerprint=arguments.fingerprint,
        request_timeout_s=gateway.request_timeout_s,
        otlp_endpoint=gateway.otlp_endpoint,
    )
    groups = () if model.experts.groups == "auto" or model.experts.transport == "local" else model.experts.groups
    experts = [
        {"name": name, **replica_options(config.experts.scaling_of(group, tier), tiers)}
        for name, group, tier, tiers in named_deployments(config.experts, len(groups))
    ]
    return {
        "name": _application(model),
        "route_prefix": None,
        "import_path": "cluster.deploy.serve_config:build_model",
        "args": whole.document(),
        "deployments": [{"name": "coordinator", **replica_options(config.coordinators)}, *experts],
    }
