"""Asks Serve's controller what there is, for a bounded time; Serve's own client waits for as long as it takes.

The process has joined the Ray cluster. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.commands.at_once import at_once
from cluster.errors import Unavailable

TIMEOUT_S = 4.0
STARTING_TIMEOUT_S = 60.0  # while it starts what was deployed, on a busy machine


def details() -> Mapping[str, Any]:
    """As Serve's own REST API has them; empty where there is no Serve. Raises Unavailable."""
    told: Mapping[str, Any] | None = _ask("get_serve_instance_details", TIMEOUT_S)
    return {"applications": {}, "proxies": {}} if told is None else told


def statuses(timeout_s: float = STARTING_TIMEOUT_S) -> dict[str, Any]:
    """What Serve says of each application and its deployments. Raises Unavailable.

    `serve.status()` would tell of replicas as well. It pickles the request router of every deployment on the way, and
    that cost a quarter of a core of a server that starts.
    """
    from ray.serve._private.application_state import StatusOverview
    from ray.serve.generated.serve_pb2 import StatusOverview as Message

    told = _ask("list_serve_statuses", timeout_s) or ()
    overviews = [StatusOverview.from_proto(Message.FromString(one)) for one in told]
    return {overview.name: overview for overview in overviews}


def listens(timeout_s: float = STARTING_TIMEOUT_S) -> tuple[Any, Any]:
    """Serve's HTTPOptions and gRPCOptions, as it was started with them. Raises Unavailable, also without Serve."""
    http, grpc = _ask("get_http_config", timeout_s), _ask("get_grpc_config", timeout_s)
    if http is None or grpc is None:
        raise Unavailable("Serve does not run on this cluster")
    return http, grpc


def deployments(timeout_s: float = TIMEOUT_S) -> Mapping[Any, tuple[Any, Any]]:
    """By their ids, what each was deployed as (Serve's DeploymentInfo) and its route. Raises Unavailable."""
    told: Mapping[Any, tuple[Any, Any]] | None = _ask("list_deployments_internal", timeout_s)
    return told or {}


def _ask(method: str, timeout_s: float) -> Any:
    """None where there is no Serve. Raises Unavailable where its controller does not answer in time."""
    import ray

    controller = _controller(timeout_s)
    if controller is None:
        return None
    try:
        return ray.get(getattr(controller, method).remote(), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise Unavailable(
            f"Serve's controller does not answer within {timeout_s:g} s; `manta status` says what to do"
        ) from error


def _controller(timeout_s: float) -> Any:
    """Its actor; None where there is none. Ray's GCS is asked for it, for which Ray itself waits a minute."""
    import ray
    from ray.serve import context
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    client: Any = context._global_client if context._cached_client_from_current_session() else None
    if client is not None:
        return client._controller
    name = SERVE_CONTROLLER_NAME
    found = at_once({name: lambda: ray.get_actor(name, SERVE_NAMESPACE)}, timeout_s).get(name)
    if isinstance(found, ValueError):
        return None
    if found is None or isinstance(found, Exception):
        raise Unavailable(
            f"Ray's GCS did not say within {timeout_s:g} s where Serve's controller is: it stands still, or this "
            "machine is overloaded (`gcs_server`, on the head)"
        ) from found
    return found
