"""PodDisruptionBudgets: how many pods of a role a drained machine may take at once.

A number of pods that stay, never a percentage or `maxUnavailable`: pods of a RayCluster have no scale subresource, so
Kubernetes cannot know how many there should be.
"""

from __future__ import annotations

from typing import Any

from cluster.config import MantaConfig
from cluster.kubernetes import names
from cluster.kubernetes.sizes import pod_groups


def disruption_budgets(config: MantaConfig) -> list[dict[str, Any]]:
    """One at a time. The head stays until somebody says otherwise; a role with one pod lets it go."""
    stay = {"head": 1} | {role: group.min_pods - 1 for role, group in pod_groups(config).items()}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"manta-{role}", "labels": {"app.kubernetes.io/part-of": "manta"}},
            "spec": {
                "minAvailable": count,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": {names.ROLE: role}},
            },
        }
        for role, count in stay.items()
        if count
    ]
