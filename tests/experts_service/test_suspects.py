"""A suspected replica is trusted again as soon as its shard shows a sign of life, and only then."""

from __future__ import annotations

import asyncio

from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.suspects import look_at_suspects

DEPLOYMENT = Deployment("model", "expert-0")


def test_a_suspect_that_shows_a_sign_of_life_is_trusted_again_and_no_other() -> None:
    table, asked = RoutingTable(), []
    table.publish(DEPLOYMENT, [Replica(name, name, "test", 0, "f") for name in ("well", "dead", "trusted")])
    for name in ("well", "dead"):
        table.suspect(DEPLOYMENT, name, table.epoch)

    async def lives(replica: Replica) -> bool:
        asked.append(replica.replica_id)
        return replica.replica_id == "well"

    async def run() -> None:
        task = asyncio.get_running_loop().create_task(look_at_suspects(table, [DEPLOYMENT], lives))
        async with asyncio.timeout(60):
            while asked.count("dead") < 2:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    assert {one.replica_id: one.suspected for one in table.replicas(DEPLOYMENT)} == {
        "well": False, "dead": True, "trusted": False,
    }  # fmt: skip
    assert "trusted" not in asked
