"""What Serve's controller says of applications, as plain data. Asks nobody, and draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.commands.status.cluster_snapshot import COORDINATOR, ROOT, ApplicationStatus, DeploymentStatus


def application_told(name: str, told: Mapping[str, Any]) -> ApplicationStatus:
    """One of the details' applications."""
    deployments = tuple(
        DeploymentStatus(
            name=key,
            status=word(one["status"]),
            replicas=dict(Counter(word(replica["state"]) for replica in one["replicas"])),
            message=one["message"],
        )
        for key, one in sorted(told["deployments"].items())
        if key != ROOT  # which never runs
    )
    return ApplicationStatus(name, word(told["status"]), deployments, told["message"])


def computing(application: ApplicationStatus) -> list[str]:
    """The deployments of a model that have running replicas with kernels and figures, the coordinator's first."""
    names = [d.name for d in application.deployments if d.running and (d.name == COORDINATOR or d.group is not None)]
    return sorted(names, key=lambda name: (name != COORDINATOR, name)) if application.model is not None else []


def word(state: object) -> str:
    """Serve's, of its enums."""
    return str(getattr(state, "value", state))
