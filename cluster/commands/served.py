"""What a Ray cluster serves by now, as Serve and the gateway say it. The process has joined it; changes nothing."""

from __future__ import annotations

from typing import Any

from cluster.config import GatewayConfig
from cluster.deploy.app import GATEWAY
from cluster.errors import Unavailable
from cluster.messages import ModelCard


def statuses() -> dict[str, Any]:
    """What Serve says of each application and its deployments.

    `serve.status()` would tell of replicas as well. It pickles the request router of every deployment on the way, and
    that cost a quarter of a core of a server that starts.
    """
    from ray.serve.context import _get_global_client

    return {overview.name: overview for overview in _get_global_client().list_serve_statuses()}


def made_of(timeout_s: float) -> tuple[GatewayConfig, tuple[ModelCard, ...]]:
    """Configuration and models of the gateways that run. Raises Unavailable."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        if GATEWAY not in statuses():
            raise Unavailable("no gateway of Manta runs on this cluster; start one with `manta serve`")
        handle = serve.get_deployment_handle(GATEWAY, GATEWAY)
        answer: tuple[GatewayConfig, tuple[ModelCard, ...]] = handle.made_of.remote().result(timeout_s=timeout_s)
    except TimeoutError as error:
        raise Unavailable(f"the gateway does not say within {timeout_s:g} s what it serves") from error
    except (RayError, RayServeException) as error:
        why = "it is of another release" if "does not exist" in str(error) else str(error).strip().splitlines()[-1]
        raise Unavailable(f"the gateway does not say what it serves: {why}") from error
    return answer
