"""What a Ray cluster serves by now, as Serve and the gateway say it. The process has joined it; changes nothing."""

from __future__ import annotations

from cluster.commands.serve_controller import statuses
from cluster.config import GatewayConfig
from cluster.deploy.app import GATEWAY
from cluster.errors import Unavailable
from cluster.messages import ModelCard


def made_of(timeout_s: float) -> tuple[GatewayConfig, tuple[ModelCard, ...]]:
    """Configuration and models of the gateways that run. Raises Unavailable."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        if GATEWAY not in statuses(timeout_s):
            raise Unavailable("no gateway of Manta runs on this cluster; start one with `manta serve`")
        handle = serve.get_deployment_handle(GATEWAY, GATEWAY)
        answer: tuple[GatewayConfig, tuple[ModelCard, ...]] = handle.made_of.remote().result(timeout_s=timeout_s)
    except TimeoutError as error:
        raise Unavailable(f"the gateway does not say within {timeout_s:g} s what it serves") from error
    except (RayError, RayServeException) as error:
        why = "it is of another release" if "does not exist" in str(error) else str(error).strip().splitlines()[-1]
        raise Unavailable(f"the gateway does not say what it serves: {why}") from error
    return answer
