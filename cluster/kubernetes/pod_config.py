"""A configuration as it is in pods: where they listen, which mounted files they read, which nodes each process is on.

What the manifests decide is set here, so that a config that serves on one machine serves on Kubernetes unchanged. What
only the user can know is asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from cluster.config import GatewayConfig, MantaConfig, ModelConfig
from cluster.errors import ConfigError
from cluster.kubernetes import names
from cluster.kubernetes.sizes import GATEWAYS_PER_POD, model_size


def in_pods(config: MantaConfig) -> MantaConfig:
    """The same, for pods. Raises ConfigError for what cannot be there."""
    return config.model_copy(
        update={"gateway": _gateway(config), "models": tuple(_model(model, config) for model in config.models)}
    )


def _gateway(config: MantaConfig) -> GatewayConfig:
    gateway = config.gateway
    for name in ("http_port", "grpc_port"):
        if getattr(gateway, name) != GatewayConfig.model_fields[name].default:
            raise ConfigError(f"gateway.{name}: in pods it is {GatewayConfig.model_fields[name].default}")
    service = [names.SERVICE, f"{names.SERVICE}.{names.NAMESPACE}", f"{names.SERVICE}.{names.NAMESPACE}.svc"]
    return gateway.model_copy(
        update={
            "host": "0.0.0.0",
            "api_keys_file": Path(names.API_KEYS_FILE),
            "metrics_token_file": Path(names.METRICS_TOKEN_FILE),
            "allowed_hosts": tuple(dict.fromkeys((*gateway.allowed_hosts, *service, f"{service[-1]}.cluster.local"))),
            "label_selector": {names.ROLE: "gateway"},
            "num_cpus": config.kubernetes.gateway_cpus / GATEWAYS_PER_POD,
        }
    )


def _model(model: ModelConfig, config: MantaConfig) -> ModelConfig:
    engine, size = model.engine, model_size(model)
    if engine.device == "auto":
        raise ConfigError(f"models: {model.name!r}: engine.device: say cpu or cuda; there is no machine to look at")
    on_gpus = {} if not _has_tiers(config) else {names.TIER: "gpu"}
    update = {"label_selector": {names.ROLE: "expert", **on_gpus} if size.shares_gpu else {names.ROLE: "coordinator"}}
    if engine.device == "cpu":
        if engine.kv_cache_gib is None:
            raise ConfigError(
                f"models: {model.name!r}: engine.kv_cache_gib: say how much; a process sees the memory of its machine, "
                "not that of its pod"
            )
        if engine.num_threads is None:  # as many as the pod has cores, not the machine
            engine = engine.model_copy(update={"num_threads": config.kubernetes.coordinator_cpus})
    experts = model.experts
    if size.groups:
        changes: dict[str, object] = {"label_selector": {names.ROLE: "expert"}}
        if experts.tiers:
            changes["tiers"] = tuple(
                tier.model_copy(update={"label_selector": {names.TIER: _kind(tier.device), **tier.label_selector}})
                for tier in experts.tiers
            )
        elif _has_tiers(config):
            changes["label_selector"] = {names.ROLE: "expert", names.TIER: _kind(engine.device)}
        if experts.transport in ("auto", "lane"):
            changes["lane_secret_file"] = names.LANE_SECRET_FILE
        if engine.device == "cuda" and experts.gpus_per_shard is None and not experts.tiers:
            changes["gpus_per_shard"] = 1.0
        if engine.device == "cpu" and experts.num_threads is None and not experts.tiers:
            changes["num_threads"] = 1
        experts = experts.model_copy(update=changes)
    return model.model_copy(update={**update, "engine": engine, "experts": experts})


def _has_tiers(config: MantaConfig) -> bool:
    """Whether there are pods of both kinds for experts."""
    return any(model.experts.tiers for model in config.models)


def _kind(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"
