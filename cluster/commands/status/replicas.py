"""Asks all replicas of a deployment through Serve's handle, for as long as one waits for them. Knows no answer."""

from __future__ import annotations

from typing import Any


def ask_replicas(application: str, deployment: str, method: str, timeout_s: float) -> list[Any]:
    """What they answer, or the error that came instead; nothing where they are not all heard in time."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        handle: Any = serve.get_deployment_handle(deployment, app_name=application)
        return list(handle.broadcast(method).results(timeout_s=timeout_s, return_exceptions=True))
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        return []
