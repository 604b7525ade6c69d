"""How Serve's knowledge of replicas reaches this process: a request router that also fills the routing table.

Serve builds the router itself, lazily, in every process that holds a handle, on a thread of its choice. It pickles this
module by value, so the table lives in a module of its own, which goes by name: one table a process, the only
module-level state there is.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import RunningReplica

from cluster import expert_deployments
from experts_service import routing_table


class ExpertRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Serve's stock choice of replicas; every update also goes into this process's table."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        application, name = self._deployment_id.app_name, self._deployment_id.name
        routing_table.TABLE.publish_tier(
            routing_table.Deployment(application, expert_deployments.first_deployment(name)),
            name,
            [
                routing_table.Replica(replica_id=replica.replica_id.unique_id, tier=name, **replica.replica_metadata)
                for replica in replicas
            ],
        )


def replica_metadata(*, actor: str, namespace: str, group: int, fingerprint: str) -> dict[str, Any]:
    """What an ExpertService publishes once through Serve; holds for every incarnation of its shard."""
    return {"actor": actor, "namespace": namespace, "group": group, "fingerprint": fingerprint}
