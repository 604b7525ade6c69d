"""A thousand requests whose clients leave: the processes that served them hold nothing of them afterwards."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

MODEL = "manta-demo"
NUM_REQUESTS, AT_ONCE = 500, 24  # in each of two rounds
LEAK = NUM_REQUESTS // 4  # more objects of a kind after the second round than after the first


@pytest.fixture
def objects(ray_cluster):
    """Counts the objects of every class in the gateway's and the coordinator's process."""
    import ray
    from ray.util import list_named_actors

    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    kinds = ("#gateway#", "#coordinator#")
    replicas = [
        next(name for name in names if name.startswith(f"SERVE_REPLICA::{app}") and kind in name)
        for app, kind in zip(("gateway", "mistral-small"), kinds, strict=True)
    ]

    def counted(_: Any) -> Counter[str]:
        import gc

        gc.collect()
        return Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())

    def count() -> list[Counter[str]]:
        actors = [ray.get_actor(name, namespace="serve") for name in replicas]
        return ray.get([actor.__ray_call__.remote(counted) for actor in actors], timeout=60)

    return count


async def leave(client: httpx.AsyncClient, index: int, drawn: random.Random) -> None:
    """Ask for much, and leave: before the first token, or after some; one choice or two, a stream or not."""
    body = {"model": MODEL, "prompt": f"Question {index % 40}", "max_tokens": 1000, "ignore_eos": True}
    if index % 3 == 0:
        asking = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await asyncio.wait((asking,), timeout=drawn.uniform(0, 0.2))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return
    body |= {"stream": True, "n": 1 + index % 2}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        chunks = drawn.randrange(5)
        async for line in response.aiter_lines():
            chunks -= line.startswith("data: {")
            if chunks < 0:
                return


async def abort_many(url: str, seed: int) -> None:
    drawn, slots = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def one(client: httpx.AsyncClient, index: int) -> None:
        async with slots:
            await leave(client, index, drawn)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(one(client, index) for index in range(NUM_REQUESTS)))


def test_a_thousand_aborted_requests_leave_nothing(server, objects, wait_until_idle):
    counts = []
    for seed in range(2):
        asyncio.run(abort_many(server.url, seed))
        wait_until_idle(5.0)
        assert httpx.get(f"{server.url}/load", timeout=30).json() == {"server_load": 0}
        counts.append(objects())
    for before, after in zip(*counts, strict=True):
        grown = {name: after[name] - before[name] for name in after if after[name] - before[name] > LEAK}
        assert grown == {}
