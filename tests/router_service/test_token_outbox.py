"""What a gateway gets of a coordinator's tokens: a step's in one item, joined while it is behind, and signs of life."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing
from dataclasses import replace

import pytest

from cluster.errors import CoordinatorLost, Unavailable
from cluster.messages import TokenChunk, TokenLogprobs
from cluster.token_chunks import join
from router_service import token_outbox
from router_service.token_outbox import TokenOutboxes


def chunk(request_id, position, finish_reason=None):
    return TokenChunk(request_id, 0, position, (100 + position,), finish_reason=finish_reason)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(token_outbox, "READERLESS_S", 0.1)


def test_tokens_of_a_step_are_one_item_and_wait_for_the_first_reader():
    async def run():
        outbox = TokenOutboxes().of("gateway")
        for name in "abc":
            outbox.put(chunk(name, 0))
        async with aclosing(outbox.items()) as items:
            assert await anext(items) == ()
            assert await anext(items) == (chunk("a", 0), chunk("b", 0), chunk("c", 0))
            outbox.put(chunk("b", 1))
            assert await anext(items) == (chunk("b", 1),)

    asyncio.run(run())


def test_a_reader_that_is_behind_gets_one_chunk_of_each_request():
    async def run():
        outbox = TokenOutboxes().of("gateway")
        async with aclosing(outbox.items()) as items:
            await anext(items)
            for position in range(50):
                for name in "ab":
                    outbox.put(chunk(name, position, "length" if position == 49 else None))
            first, second = await anext(items)
        assert (first.request_id, second.request_id) == ("a", "b")
        for joined in (first, second):
            assert joined.token_ids == tuple(range(100, 150))
            assert (joined.first_position, joined.finish_reason) == (0, "length")

    asyncio.run(run())


def test_no_item_is_larger_than_grpc_takes():
    """One of 4 MiB would end the stream, for everybody."""
    top = tuple((31_000 + i, -i / 3) for i in range(20))
    scores = tuple(TokenLogprobs(-i / 7, top) for i in range(5000))
    heavy = [replace(chunk(name, 0), prompt_logprobs=scores, logprobs=(scores[0],)) for name in "ab"]

    async def run():
        got = {"a": [], "b": []}
        outbox = TokenOutboxes().of("gateway")
        for one in heavy:
            outbox.put(one)
        async with aclosing(outbox.items()) as items:
            while sum(len(one.token_ids) for parts in got.values() for one in parts) < 2:
                item = await anext(items)
                assert len(pickle.dumps(item)) < 2 * 2**20
                for part in item:
                    got[part.request_id].append(part)
        assert [join(got[name]) for name in "ab"] == heavy

    asyncio.run(run())


def test_a_request_ends_with_its_last_chunk_or_its_error():
    async def fail(outbox, name):
        with outbox.outgoing((name, 0)) as outgoing:
            outgoing.put(chunk(name, 0))
            outgoing.put(Unavailable("an expert"))
            await asyncio.wait_for(outgoing.sent(), 1)

    async def run():
        outbox = TokenOutboxes().of("gateway")
        with outbox.outgoing(("a", 0)) as outgoing:
            outgoing.put(chunk("a", 0))
            outgoing.put(chunk("a", 1, "stop"))
            await asyncio.wait_for(outgoing.sent(), 1)
            assert outgoing.num_tokens == 2
        with pytest.raises(Unavailable):
            await fail(outbox, "b")
        async with aclosing(outbox.items()) as items:
            await anext(items)
            [left] = await anext(items)
        assert left.request_id == "a", "what was given up is not sent, what is complete is"

    asyncio.run(run())


@pytest.mark.usefixtures("impatient")
def test_there_is_an_empty_item_where_there_is_nothing_to_send():
    async def run():
        outbox = TokenOutboxes().of("gateway")
        async with aclosing(outbox.items()) as items:
            assert [await anext(items) for _ in range(5)] == [()] * 5

    asyncio.run(run())


@pytest.mark.usefixtures("impatient")
def test_a_second_reader_takes_the_place_of_the_first():
    async def run():
        outbox = TokenOutboxes().of("gateway")
        first, second = outbox.items(), outbox.items()
        await anext(first)
        await anext(second)
        outbox.put(chunk("a", 0))
        assert [item async for item in first] == []
        assert await anext(second) == (chunk("a", 0),)
        await second.aclose()

    asyncio.run(run())


@pytest.mark.usefixtures("impatient")
def test_requests_that_nobody_reads_the_tokens_of_are_given_up():
    async def run():
        outboxes = TokenOutboxes()
        outbox = outboxes.of("gateway")
        async with aclosing(outbox.items()) as items:
            await anext(items)
            with outbox.outgoing(("a", 0)) as outgoing, pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(outgoing.sent()), 0.3)
        assert outboxes.of("gateway") is outbox
        with pytest.raises(CoordinatorLost), outbox.outgoing(("b", 0)) as outgoing:
            await asyncio.wait_for(outgoing.sent(), 5)
        assert outboxes._outboxes == {}

    asyncio.run(run())


def test_a_reader_that_comes_again_in_time_finds_what_it_has_missed(monkeypatch):
    monkeypatch.setattr(token_outbox, "READERLESS_S", 30.0)

    async def run():
        outboxes = TokenOutboxes()
        for position in range(5):
            outboxes.of("gateway").put(chunk("a", position))
            async with aclosing(outboxes.of("gateway").items()) as items:
                assert await anext(items) == ()
                assert await anext(items) == (chunk("a", position),)
            await asyncio.sleep(0.03)
        assert outboxes.of("another") is not outboxes.of("gateway")

    asyncio.run(run())
