"""What Serve's controller says of all that it runs, as plain data. Asks nobody else, and draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.commands.at_once import at_once
from cluster.commands.status.cluster_snapshot import COORDINATOR, ROOT, ApplicationStatus, DeploymentStatus

TIMEOUT_S = 4.0


def controller_details() -> Mapping[str, Any] | None:
    """As Serve's own REST API has them, empty where there is no Serve; None where it does not answer in time."""
    details = at_once({"": _details}, TIMEOUT_S).get("")
    return details if isinstance(details, Mapping) else None


def _details() -> Mapping[str, Any]:
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {"applications": {}, "proxies": {}}
    details: Mapping[str, Any] = client.get_serve_details()
    return details


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
