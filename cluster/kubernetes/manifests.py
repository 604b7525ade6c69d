"""All manifests that one configuration decides, and their text. What none decides lies in `k8s/base`."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.config import MantaConfig
from cluster.kubernetes.disruption import disruption_budgets
from cluster.kubernetes.model_volume import model_volume
from cluster.kubernetes.ray_service import ray_service

HEADER = "# Made by `manta k8s render --config manta.yaml`: edit manta.yaml and render again.\n"


def manifests(config: MantaConfig) -> list[dict[str, Any]]:
    """RayService, disruption budgets, and the models' volume and Job. Raises ConfigError or DoesNotFit."""
    return [ray_service(config), *disruption_budgets(config), *model_volume(config)]


def render(config: MantaConfig) -> str:
    """The text of all of them."""
    documents = (yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=120) for one in manifests(config))
    return HEADER + "---\n".join(documents)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and no anchors: kustomize merges what it can read."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
