"""What becomes of the models that `manta apply` deploys, by what Serve has of their deployments. Changes nothing.

Serve compares the same: of another version or other resources it replaces the replicas, and all else it changes in
place. The process has joined the Ray cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.commands.serve_controller import deployments
from cluster.deploy.model_root import DEPLOYMENT as ROOT

STARTS = "starts"
STAYS = "stays as it is"
NUMBERS = "numbers of replicas change"
REPLACED = "settings change: its processes are replaced, each new one first"
REPLACED_WITHOUT_SURGE = "settings change: its processes are replaced, each old one ends first"
IN_PLACE = "settings change, its processes stay"
GOES = "ends its streams and goes, once all else runs"


class Deployed(NamedTuple):
    """One deployment, as Serve has it or is to have it."""

    version: Any  # Serve's, of everything that replicas are made of
    numbers: Mapping[str, Any]  # how many of them, and when
    in_place: Mapping[str, Any]  # what else may change


def deployed(timeout_s: float) -> dict[str, dict[str, Deployed]]:
    """What Serve has, by application and deployment. Raises Unavailable."""
    found: dict[str, dict[str, Deployed]] = {}
    for one, (info, _) in deployments(timeout_s).items():
        described = _described(info.version, info.deployment_config, info.replica_config)
        found.setdefault(one.app_name, {})[one.name] = described
    return found


def wanted(target: Any) -> dict[str, Deployed]:
    """The same of an application that `serve.run_many` is given, by deployment."""
    from ray.serve._private.build_app import build_app
    from ray.serve._private.config import DeploymentConfig

    built = build_app(target.target, name=target.name, make_deployment_handle=lambda *_: None)
    return {
        one.name: _described(
            one.version,
            DeploymentConfig.from_proto_bytes(one._deployment_config.to_proto_bytes()),  # as Serve is told
            one._replica_config,
        )
        for one in built.deployments
    }


def change(before: Mapping[str, Deployed], after: Mapping[str, Deployed], *, surges: bool) -> str:
    """In words. `surges`: whether a new process starts before an old one ends."""
    pairs = [(before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys()) if name != ROOT]
    both = [(old, new) for old, new in pairs if old is not None and new is not None]
    said = []
    if len(both) < len(pairs) or any(old.version.requires_actor_restart(new.version) for old, new in both):
        said.append(REPLACED if surges else REPLACED_WITHOUT_SURGE)
    elif any(old.in_place != new.in_place for old, new in both):
        said.append(IN_PLACE)
    if any(old.numbers != new.numbers for old, new in both):
        said.append(NUMBERS)
    return "; ".join(said) or STAYS


def _described(version: str | None, config: Any, replicas: Any) -> Deployed:
    from ray.serve._private.version import DeploymentVersion

    by_load = config.autoscaling_config is not None  # then Serve has the present number
    return Deployed(
        DeploymentVersion(
            version,
            config,
            {key: value for key, value in replicas.ray_actor_options.items() if key != "runtime_env"},  # the driver's
            placement_group_bundles=replicas.placement_group_bundles,
            placement_group_strategy=replicas.placement_group_strategy,
            placement_group_bundle_label_selector=replicas.placement_group_bundle_label_selector,
            placement_group_fallback_strategy=replicas.placement_group_fallback_strategy,
            max_replicas_per_node=replicas.max_replicas_per_node,
        ),
        config.model_dump(include={"autoscaling_config" if by_load else "num_replicas"}),
        config.model_dump(exclude={"autoscaling_config", "num_replicas", "version", "user_configured_option_names"}),
    )
