"""PodDisruptionBudgets: how many pods of a kind a drained machine may take at once.

A number of pods that stay, never a percentage or `maxUnavailable`: pods of a RayCluster have no scale subresource, so
Kubernetes cannot know how many there should be.
"""

from __future__ import annotations

from typing import Any

from cluster.config import MantaConfig
from cluster.kubernetes import names
from cluster.kubernetes.sizes import pod_groups


def disruption_budgets(config: MantaConfig) -> list[dict[str, Any]]:
    """One at a time. The head stays until somebody says otherwise; a kind with one pod lets it go."""
    groups = pod_groups(config)
    stay = {"head": 1} | {name: group.min_pods - 1 for name, group in groups.items()}
    labels = {"head": {names.ROLE: "head"}} | {name: group.labels for name, group in groups.items()}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"manta-{name}", "labels": {"app.kubernetes.io/part-of": "manta"}},
            "spec": {
                "minAvailable": count,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": labels[name]},
            },
        }
        for name, count in stay.items()
        if count
    ]
