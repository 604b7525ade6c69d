"""Whether a gateway's loop is watched, and whether what Serve does with it before it is ready counts as a block."""

import asyncio
import time
import types

from ray import serve

from cluster.config import GatewayConfig
from gateway.service import GatewayReplica

name = types.SimpleNamespace(unique_id="r")
config = types.SimpleNamespace(graceful_shutdown_timeout_s=60.0)
serve.get_replica_context = lambda: types.SimpleNamespace(replica_id=name, _deployment_config=config)


async def start():
    """As Serve does: it makes the application, imports what serves it, collects garbage, asks whether it is well."""
    replica = GatewayReplica(GatewayConfig(), ())
    replica.__serve_build_asgi_app__()
    await asyncio.sleep(0.05)
    until = time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
    for _ in range(3):
        await replica.check_health()
        await asyncio.sleep(0.05)
    return replica.frontend.metrics.loop


watch = asyncio.run(start())
count = next(s.value for m in watch._blocks.collect() for s in m.samples if s.name.endswith("_count"))
print(count > 1, watch.longest[0] < 0.1)
