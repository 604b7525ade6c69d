"""Whether a gateway's loop is watched, and whether making the application counts as a block of it."""

import asyncio
import time
import types

from ray import serve

import gateway.service
from cluster.config import GatewayConfig
from gateway.service import GatewayReplica

name = types.SimpleNamespace(unique_id="r")
config = types.SimpleNamespace(graceful_shutdown_timeout_s=60.0)
serve.get_replica_context = lambda: types.SimpleNamespace(replica_id=name, _deployment_config=config)
build_app = gateway.service.build_app


def build_slowly(frontend):
    while time.thread_time() < until:
        pass
    return build_app(frontend)


gateway.service.build_app = build_slowly


async def start():
    global until
    replica = GatewayReplica(GatewayConfig(), ())
    until = time.thread_time() + 0.2
    replica.__serve_build_asgi_app__()
    watch = replica.frontend.metrics.loop
    await asyncio.sleep(0.1)
    return watch


watch = asyncio.run(start())
count = next(s.value for m in watch._blocks.collect() for s in m.samples if s.name.endswith("_count"))
print(count > 1, watch.longest[0] < 0.1)
