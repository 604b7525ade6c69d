"""The root of a model's Serve application: a deployment without replicas, whose place the coordinators would have.

What Serve 2.60 does to the root of an application is wrong for coordinators. Behind HAProxy each of its replicas opens
an HTTP and a gRPC port; a request router of one's own is refused there, and where it was slipped in all the same, an
entry for the root under `deployments` in a Serve config puts Serve's own router back without a word. Nothing calls this
one, so it costs no process.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

DEPLOYMENT = "root"


class ModelRoot:
    """Is never made."""

    def __init__(self, coordinator: Any) -> None:
        """`coordinator` is the handle that ties the application together."""


def model_root(coordinator: serve.Application) -> serve.Application:
    """The application that holds `coordinator` and all that it was bound to."""
    deployment = serve.deployment(ModelRoot).options(
        name=DEPLOYMENT,
        autoscaling_config=AutoscalingConfig(min_replicas=0, initial_replicas=0, max_replicas=1),
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(coordinator)
