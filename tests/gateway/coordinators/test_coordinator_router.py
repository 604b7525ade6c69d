"""Which coordinator a request goes to, with real replicas: its prefix's favourite, while that is not much busier."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from ray import cloudpickle, serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter

from cluster.errors import CoordinatorLost
from cluster.messages import ModelCard, Request, SamplingParams, TokenChunk
from gateway.coordinators.choice import MOST_BEHIND, PREFIX_TOKENS, prefix_of, ranked
from gateway.coordinators.router import CoordinatorRouter
from gateway.coordinators.serve_client import COORDINATOR, ServeCoordinatorClient
from gateway.coordinators.table import TABLE, CoordinatorTable
from router_service.token_outbox import TokenOutboxes
from tests.gateway.doubles import model_card
from tests.waiting import wait_for

APPLICATION = "router-test"
NUM_REPLICAS = 3


@pytest.fixture(scope="module")
def application(ray_cluster: str) -> Iterator[str]:
    """Replicas without a model, which answer with their own names for as long as a request wants them to.

    On a busy machine one may take longer to say how busy it is than Serve gives it (0.1 s): its requests would go
    elsewhere, which no test here is about.
    """
    patient = pytest.MonkeyPatch()
    for deadline in "queue_len_response_deadline_s", "max_queue_len_response_deadline_s":
        patient.setattr(RequestRouter, deadline, 20.0)

    class Replica:  # local, so that it travels by value: the cluster's processes know nothing of tests
        def __init__(self) -> None:
            self.name = serve.get_replica_context().replica_id.unique_id
            self.outboxes = TokenOutboxes()

        async def generate(self, request: Any, gateway: str) -> None:
            num_tokens = request.sampling.max_tokens
            for position in range(num_tokens):
                await asyncio.sleep(0.1 if position else 0)
                reason = "length" if position == num_tokens - 1 else None
                chunk = TokenChunk(*request.key, position, (self.name,), finish_reason=reason)
                self.outboxes.of(gateway).put(chunk)

        async def token_stream(self, stream: Any) -> AsyncIterator[Any]:
            assert stream.coordinator == self.name, "it comes to the one that it is meant for"
            async for item in self.outboxes.of(stream.gateway).items():
                yield item

        async def embed(self, requests: Any) -> str:
            await asyncio.sleep(0.1 * (requests[0].sampling.max_tokens - 1))
            return self.name

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
    serve.delete(APPLICATION, _blocking=False)
    patient.undo()


@pytest.fixture(autouse=True)
def nobody_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stands still one may seem so, and others are asked."""
    monkeypatch.setattr(CoordinatorTable, "silent", frozenset())


@pytest.fixture
def asked_card(application: str, card: ModelCard) -> ModelCard:
    return model_card(card.directory, application=application)  # type: ignore[arg-type]


def request(beginning: int, end: int, *, length: int = 50, salt: str = "", tokens: int = 1) -> Request:
    """Requests of one `beginning` share PREFIX_TOKENS tokens, and no more."""
    prompt = (*(beginning + i for i in range(PREFIX_TOKENS)), *(end + i for i in range(length - PREFIX_TOKENS)))
    return Request(uuid.uuid4().hex, prompt[:length], SamplingParams(max_tokens=tokens), 0, cache_salt=salt)


@asynccontextmanager
async def gateway(card: ModelCard) -> AsyncIterator[ServeCoordinatorClient]:
    """A gateway's way to the replicas."""
    client = ServeCoordinatorClient(card)
    try:
        yield client
    finally:
        await client.close()


async def answer(client: ServeCoordinatorClient, asked: Request) -> str:
    [name] = {name async for chunk in client.generate(asked) for name in chunk.token_ids}
    return str(name)


def answers(card: ModelCard, *asked: Request) -> list[str]:
    async def ask() -> list[str]:
        async with gateway(card) as client:
            return [await answer(client, one) for one in asked]

    return asyncio.run(ask())


def favourite_of(card: ModelCard, asked: Request) -> str:
    """Who answers it once nothing counts as under way any more of what earlier tests asked."""
    answers(card, asked)  # which fills the table
    everybody = sorted(TABLE.coordinators(APPLICATION))
    favourite = ranked(everybody, Counter(), (), prefix=prefix_of(asked))[0][0]
    wait_for(lambda: answers(card, asked) == [favourite], 60, "the favourite")
    return favourite


def test_requests_that_begin_alike_go_to_one_coordinator(asked_card: ModelCard) -> None:
    favourites = {}
    for beginning in range(100, 6100, 100):
        names = answers(asked_card, *(request(beginning, end) for end in range(3)))
        assert len(set(names)) == 1, "all of one beginning"
        favourites[beginning] = names[0]
    assert len(set(favourites.values())) == NUM_REPLICAS, "beginnings are spread"
    assert answers(asked_card, *(request(beginning, 9) for beginning in favourites)) == list(favourites.values())
    salted = answers(asked_card, *(request(beginning, 0, salt="key-2") for beginning in favourites))
    assert salted != list(favourites.values()), "what is not shared needs no common place"


def test_short_prompts_and_embeddings_have_no_favourite(asked_card: ModelCard) -> None:
    short = answers(asked_card, *(request(100, 0, length=PREFIX_TOKENS - 1) for _ in range(40)))
    assert len(set(short)) == NUM_REPLICAS

    async def embed() -> list[Any]:
        async with gateway(asked_card) as client:
            return [await client.embed((request(100, 0),)) for _ in range(40)]

    assert len(set(asyncio.run(embed()))) == NUM_REPLICAS


def test_a_favourite_that_is_much_busier_is_passed_over(asked_card: ModelCard) -> None:
    """Sixty requests of one beginning, at once and each a few seconds long."""

    async def ask() -> list[str]:
        async with gateway(asked_card) as client:
            return await asyncio.gather(*(answer(client, request(100, end, tokens=60)) for end in range(60)))

    counts = Counter(asyncio.run(ask()))
    assert len(counts) == NUM_REPLICAS
    assert max(counts.values()) <= min(counts.values()) + 2 * MOST_BEHIND


def test_a_silent_coordinator_is_asked_only_where_there_is_no_other(
    asked_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    favourite = favourite_of(asked_card, request(100, 0))
    everybody = TABLE.coordinators(APPLICATION)
    for silent in ({favourite}, everybody):
        monkeypatch.setattr(CoordinatorTable, "silent", frozenset(silent))  # they are not, and would be heard
        names = answers(asked_card, *(request(100, end) for end in range(5)))
        assert len(set(names)) == 1
        assert (names[0] == favourite) == (silent == everybody)


def test_a_coordinator_whose_step_failed_with_a_request_is_asked_only_where_there_is_no_other(
    asked_card: ModelCard,
) -> None:
    """The favourite of its beginning was also where it went again."""
    favourite = favourite_of(asked_card, request(100, 0))
    everybody = tuple(TABLE.coordinators(APPLICATION))
    others = tuple(name for name in everybody if name != favourite)
    asked = [replace(request(100, end), failed_on=(favourite,)) for end in range(5)]
    assert favourite not in answers(asked_card, *asked)
    assert answers(asked_card, replace(request(100, 0), failed_on=others)) == [favourite]
    assert answers(asked_card, replace(request(100, 0), failed_on=everybody)) == [favourite]


def test_embeddings_of_a_lost_coordinator_are_not_waited_for(asked_card: ModelCard) -> None:
    """Each left a stack in the log, as did those whose client went."""
    complaints: list[str] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        async with gateway(asked_card) as client, asyncio.timeout(20):
            asked = request(100, 0, tokens=600)
            embeddings = asyncio.ensure_future(client.embed((asked, request(100, 1))))
            while (place := TABLE.place(asked.key)) is None:
                await asyncio.sleep(0.01)
            client.inbox.lose(place, "it is silent")
            with pytest.raises(CoordinatorLost, match="it is silent"):
                await embeddings
            assert TABLE.place(asked.key) is None

    asyncio.run(run())
    gc.collect()
    assert not complaints
