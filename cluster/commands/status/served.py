"""What Serve's controller says of all that it runs, as plain data. Asks nobody else, and draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.commands.status.cluster_snapshot import COORDINATOR, ROOT, ApplicationStatus, DeploymentStatus

TIMEOUT_S = 4.0


def controller_details() -> Mapping[str, Any] | None:
    """As Serve's own REST API has them, empty where there is no Serve; None where it does not answer in time.

    Not by Serve's client, which waits for as long as it takes: in a thread that nobody waits for any more it would call
    Ray after Ray was left, and that ends the process without a word.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return {"applications": {}, "proxies": {}}
    try:
        details: Mapping[str, Any] = ray.get(controller.get_serve_instance_details.remote(), timeout=TIMEOUT_S)
    except ray.exceptions.RayError:
        return None
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
