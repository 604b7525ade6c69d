"""How Serve's knowledge of replicas reaches this process: a request router that also fills the routing table.

Serve builds the router itself, lazily, in every process that holds a handle, on a thread of its choice. So the table it
fills has to be found by module: the only module-level state there is. No torch here: Serve's controller imports this.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import RunningReplica

from experts_service.routing_table import Deployment, Replica, RoutingTable

TABLE = RoutingTable()


class ExpertRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Serve's stock choice of replicas; every update also goes into this process's table."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        deployment = Deployment(self._deployment_id.app_name, self._deployment_id.name)
        TABLE.publish(deployment, [_replica(r) for r in replicas if r.replica_metadata])


def replica_metadata(*, actor: str, namespace: str, group: int, fingerprint: str) -> dict[str, Any]:
    """What an ExpertService publishes once through Serve; holds for every incarnation of its shard."""
    return {"actor": actor, "namespace": namespace, "group": group, "fingerprint": fingerprint}


def _replica(replica: RunningReplica) -> Replica:
    return Replica(replica_id=replica.replica_id.unique_id, **replica.replica_metadata)
