"""Looks at replicas that are suspected, until they show a sign of life. Knows the routing table; knows no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from experts_service.routing_table import Deployment, Replica, RoutingTable

LOOK_S = 1.0  # between two looks at suspected replicas,
LONGEST_LOOK_S = 30.0  # and at one that shows signs of life and fails again and again


async def look_at_suspects(
    table: RoutingTable, deployments: Iterable[Deployment], lives: Callable[[Replica], Awaitable[bool]]
) -> None:
    """Trust a suspected replica again when its shard shows a sign of life. Goes on until it is cancelled.

    No row would find out: those go to other replicas, and where there is none, nothing is admitted any more.
    """
    clock = asyncio.get_running_loop().time
    of_groups = tuple(deployments)
    due: dict[str, tuple[float, float]] = {}  # replica id → when to look again, and the pause after that
    while True:
        await asyncio.sleep(LOOK_S)
        now = clock()
        due = {replica_id: at for replica_id, at in due.items() if now < at[0] + LONGEST_LOOK_S}
        for deployment in of_groups:
            for replica in reversed(table.replicas(deployment)):  # who is trusted comes first
                if not replica.suspected:
                    break
                look_at, pause_s = due.get(replica.replica_id, (now, LOOK_S))
                if now >= look_at and await lives(replica):
                    due[replica.replica_id] = (now + pause_s, min(2 * pause_s, LONGEST_LOOK_S))
                    table.trust(deployment, replica.replica_id)
