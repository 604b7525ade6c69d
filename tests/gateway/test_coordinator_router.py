"""Which coordinator a request goes to, with real replicas: its prefix's favourite, while that is not much busier."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from ray import cloudpickle, serve
from ray.serve.config import RequestRouterConfig

from cluster.messages import ModelCard, Request, SamplingParams
from gateway.coordinator_client import COORDINATOR, ServeCoordinatorClient
from gateway.coordinator_router import MOST_BEHIND, PREFIX_TOKENS, CoordinatorRouter
from tests.gateway.doubles import model_card

APPLICATION = "router-test"
NUM_REPLICAS = 3


@pytest.fixture(scope="module")
def application(ray_cluster: str) -> Iterator[str]:
    """Replicas without a model, which answer with their own names for as long as a request wants them to."""

    class Replica:  # local, so that it travels by value: the cluster's processes know nothing of tests
        async def generate(self, request: Any) -> AsyncIterator[str]:
            name = serve.get_replica_context().replica_id.unique_id
            for _ in range(request.sampling.max_tokens):
                yield name
                await asyncio.sleep(0.1)

        async def embed(self, requests: Any) -> str:
            return serve.get_replica_context().replica_id.unique_id

    deployment = serve.deployment(Replica).options(
        name=COORDINATOR,
        num_replicas=NUM_REPLICAS,
        ray_actor_options={"num_cpus": 0.01},
        max_ongoing_requests=1000,
        request_router_config=RequestRouterConfig.from_serialized_request_router_cls(
            {}, cloudpickle.dumps(CoordinatorRouter)
        ),
    )
    serve.run(deployment.bind(), name=APPLICATION, route_prefix=None)
    yield APPLICATION
    serve.delete(APPLICATION)


@pytest.fixture
def client(application: str, card: ModelCard) -> ServeCoordinatorClient:
    return ServeCoordinatorClient(model_card(card.directory, application=application))  # type: ignore[arg-type]


def request(beginning: int, end: int, *, length: int = 50, salt: str = "", tokens: int = 1) -> Request:
    """Requests of one `beginning` share PREFIX_TOKENS tokens, and no more."""
    prompt = (*(beginning + i for i in range(PREFIX_TOKENS)), *(end + i for i in range(length - PREFIX_TOKENS)))
    return Request(f"{beginning}-{end}", prompt[:length], SamplingParams(max_tokens=tokens), 0, cache_salt=salt)


async def answer(client: ServeCoordinatorClient, asked: Request) -> str:
    names: set[Any] = {chunk async for chunk in client.generate(asked)}
    [name] = names
    return str(name)


def answers(client: ServeCoordinatorClient, *asked: Request) -> list[str]:
    async def ask() -> list[str]:
        return [await answer(client, one) for one in asked]

    return asyncio.run(ask())


def test_requests_that_begin_alike_go_to_one_coordinator(client: ServeCoordinatorClient) -> None:
    favourites = {}
    for beginning in range(100, 6100, 100):
        names = answers(client, *(request(beginning, end) for end in range(3)))
        assert len(set(names)) == 1, "all of one beginning"
        favourites[beginning] = names[0]
    assert len(set(favourites.values())) == NUM_REPLICAS, "beginnings are spread"
    other_gateway = ServeCoordinatorClient(client._card)
    assert answers(other_gateway, *(request(beginning, 9) for beginning in favourites)) == list(favourites.values())
    salted = answers(client, *(request(beginning, 0, salt="key-2") for beginning in favourites))
    assert salted != list(favourites.values()), "what is not shared needs no common place"


def test_short_prompts_and_embeddings_have_no_favourite(client: ServeCoordinatorClient) -> None:
    short = answers(client, *(request(100, 0, length=PREFIX_TOKENS - 1) for _ in range(40)))
    assert len(set(short)) == NUM_REPLICAS

    async def embed() -> list[Any]:
        return [await client.embed((request(100, 0),)) for _ in range(40)]

    assert len(set(asyncio.run(embed()))) == NUM_REPLICAS


def test_a_favourite_that_is_much_busier_is_passed_over(client: ServeCoordinatorClient) -> None:
    """Sixty requests of one beginning, at once and each a few seconds long."""

    async def ask() -> list[str]:
        return await asyncio.gather(*(answer(client, request(100, end, tokens=30)) for end in range(60)))

    counts = Counter(asyncio.run(ask()))
    assert len(counts) == NUM_REPLICAS
    assert max(counts.values()) <= min(counts.values()) + 2 * MOST_BEHIND
    [favourite] = answers(client, request(100, 0))
    assert counts[favourite] > 60 / NUM_REPLICAS
