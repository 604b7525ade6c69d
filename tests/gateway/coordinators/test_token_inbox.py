"""Each request gets its own tokens, in order and once, or an error; nobody waits for what cannot come."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.errors import CoordinatorLost, EngineDead, MantaError
from cluster.messages import Request, SamplingParams, TokenChunk, TokenLogprobs
from cluster.token_chunks import cut, num_bytes
from gateway.coordinators.client import StreamingClient
from gateway.coordinators.resumption import generate
from gateway.coordinators.table import CoordinatorTable
from gateway.coordinators.token_inbox import MAX_JOINED, ChunkQueue, TokenInbox


def request(name: str, output: tuple[int, ...] = ()) -> Request:
    return Request(name, (1, 2), SamplingParams(max_tokens=20), 7, output_token_ids=output)


def chunk(name: str, position: int, finish_reason: str | None = None) -> TokenChunk:
    return TokenChunk(name, 0, position, (100 + position,), finish_reason=finish_reason)  # type: ignore[arg-type]


async def read(queue: ChunkQueue) -> tuple[list[int], MantaError | None]:
    tokens: list[int] = []
    try:
        async with asyncio.timeout(5):
            async for one in queue:
                tokens += one.token_ids
    except MantaError as error:
        return tokens, error
    return tokens, None


def test_each_request_gets_its_own_tokens() -> None:
    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        with inbox.expect(request("a")) as a, inbox.expect(request("b", output=(100, 101))) as b:
            both = asyncio.gather(read(a), read(b))
            inbox.deliver((chunk("a", 0), chunk("b", 2), chunk("gone", 5)))
            await asyncio.sleep(0)
            inbox.deliver((chunk("a", 1, "stop"), chunk("b", 3)))
            inbox.deliver(())
            inbox.deliver((chunk("b", 4, "length"),))
            assert await both == [([100, 101], None), ([102, 103, 104], None)]
            assert a.is_complete
            assert b.is_complete
        inbox.deliver((chunk("a", 2),))
        assert inbox._queues == {}

    asyncio.run(run())


def test_chunks_that_its_reader_has_not_taken_are_joined() -> None:
    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        with inbox.expect(request("a")) as queue:
            for position in range(10):
                inbox.deliver((chunk("a", position, "length" if position == 9 else None),))
            [joined] = [one async for one in queue]
            assert joined.token_ids == tuple(range(100, 110))

    asyncio.run(run())


def test_what_a_client_left_unread_for_long_does_not_hold_up_others() -> None:
    """All of it became one chunk, whose ten thousand tokens became text while every other stream stood still."""

    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        turns = 0

        async def another() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        with inbox.expect(request("a")) as queue:
            for position in range(10_000):
                inbox.deliver((chunk("a", position, "length" if position == 9999 else None),))
            other = asyncio.create_task(another())
            chunks = [one async for one in queue]
            other.cancel()
        assert [token for one in chunks for token in one.token_ids] == [100 + position for position in range(10_000)]
        assert max(len(one.token_ids) for one in chunks) == MAX_JOINED
        assert turns > 100

    asyncio.run(run())


@pytest.mark.parametrize("num_siblings", [0, 3])
def test_what_a_client_does_not_read_is_held_up_to_a_bound(num_siblings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred choices with 20 candidates a token, of a client that did not read its stream, were gigabytes."""
    scored = replace(chunk("a", 0), logprobs=(TokenLogprobs(-1.0, tuple((i, -1.0) for i in range(20))),))
    size = num_bytes(scored)
    monkeypatch.setattr("gateway.coordinators.token_inbox.MAX_UNREAD_BYTES", 40 * size)
    most = 40 // (1 + num_siblings)

    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        asked = replace(request("a"), num_siblings=num_siblings)
        with inbox.expect(asked) as queue:
            for position in range(100):
                inbox.deliver((replace(scored, first_position=position),))
            tokens, error = await read(queue)
            assert len(tokens) == most + 1
            assert isinstance(error, CoordinatorLost)
        resumed = replace(asked, request_id="a~1", output_token_ids=tuple(tokens))
        with inbox.expect(resumed) as queue:  # a client that reads is never too far behind
            reading = asyncio.create_task(read(queue))
            for position in range(len(tokens), 300):
                inbox.deliver((replace(scored, request_id="a~1", first_position=position),))
                if position % 5 == 0:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
            inbox.deliver((replace(chunk("a~1", 300, "length"), logprobs=scored.logprobs),))
            assert (await reading)[1] is None

    asyncio.run(run())


def test_what_is_not_read_is_not_computed_either_and_no_token_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator went on, for tokens that are computed again once the client reads on."""
    monkeypatch.setattr("gateway.coordinators.token_inbox.MAX_UNREAD_BYTES", 10 * num_bytes(chunk("a", 0)))

    class Coordinators(StreamingClient):
        """Each call sends tokens until it is cancelled, or has sent all."""

        num_sent = 0

        def ask(self, asked: Request) -> asyncio.Task[None]:
            return asyncio.create_task(self._send(asked))

        async def _send(self, asked: Request) -> None:
            for position in range(len(asked.output_token_ids), 50):
                self.num_sent += 1
                self.inbox.deliver((chunk(asked.request_id, position, "length" if position == 49 else None),))
                await asyncio.sleep(0)

        def meaning(self, error: BaseException) -> BaseException:
            return error

        def coordinators(self) -> frozenset[str]:
            return frozenset({"c"})

    async def run() -> None:
        client = Coordinators(TokenInbox(CoordinatorTable()))
        tokens: list[int] = []
        async with asyncio.timeout(20):
            async for one in generate(client, request("a"), resume_timeout_s=20.0):
                tokens += one.token_ids
                for _ in range(100):  # it reads slowly
                    await asyncio.sleep(0)
        assert tokens == list(range(100, 150))
        assert client.num_sent < 2 * 50

    asyncio.run(run())


def test_the_scores_of_a_prompt_are_not_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a bound of their own, and none is read before the first token."""
    monkeypatch.setattr("gateway.coordinators.token_inbox.MAX_UNREAD_BYTES", 1000)

    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        whole = replace(chunk("a", 0, "stop"), prompt_logprobs=(None, *[TokenLogprobs(-1.0)] * 1000))
        with inbox.expect(request("a")) as queue:
            for part in cut(whole, 1000):
                inbox.deliver((part,))
            assert await read(queue) == ([100], None)

    asyncio.run(run())


def test_a_prompt_that_comes_in_parts_is_read_as_one_chunk() -> None:
    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        scores = tuple(TokenLogprobs(-float(i)) for i in range(100))
        whole = replace(chunk("a", 0, "stop"), prompt_logprobs=(None, *scores))
        with inbox.expect(request("a")) as queue:
            reading = asyncio.create_task(anext(aiter(queue)))
            for part in cut(whole, 1000):
                assert not reading.done()
                inbox.deliver((part,))
                await asyncio.sleep(0)
            assert await reading == whole

    asyncio.run(run())


@pytest.mark.parametrize("position", [0, 2])
def test_a_token_that_comes_twice_or_not_at_all_loses_the_coordinator(position: int) -> None:
    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        with inbox.expect(request("a")) as queue:
            inbox.deliver((chunk("a", 0),))
            inbox.deliver((chunk("a", position, "stop"),))
            tokens, error = await read(queue)
            assert (tokens, type(error)) == ([100], CoordinatorLost)

    asyncio.run(run())


def test_a_lost_coordinator_is_lost_to_those_who_were_given_to_it() -> None:
    async def run() -> None:
        table = CoordinatorTable()
        inbox = TokenInbox(table)
        table.sent(("b", 0), "north")  # nobody waits for it yet
        with (
            inbox.expect(request("a")) as a, inbox.expect(request("b")) as b,
            inbox.expect(request("c")) as c, inbox.expect(request("d")) as d,
        ):  # fmt: skip
            table.sent(("a", 0), "north")
            table.sent(("c", 0), "north")
            table.sent(("c", 0), "south")  # the first one refused it
            table.sent(("d", 0), "north")
            inbox.deliver((chunk("a", 0), chunk("d", 0, "stop")))
            assert inbox.expects_from("north")
            inbox.lose("north", "silent")
            for name in "bc":
                inbox.deliver((chunk(name, 0, "stop"),))
            lost = await read(a)
            assert (lost[0], type(lost[1])) == ([100], CoordinatorLost)
            assert [await read(queue) for queue in (b, c, d)] == [([100], None)] * 3
        assert not inbox.expects_from("north")
        assert table._places == {}

    asyncio.run(run())


def test_tokens_that_came_before_an_error_are_read_before_it() -> None:
    async def run() -> None:
        inbox = TokenInbox(CoordinatorTable())
        with inbox.expect(request("a")) as queue:
            inbox.deliver((chunk("a", 0),))
            queue.fail(EngineDead("its thread"))
            queue.fail(CoordinatorLost("later"))
            inbox.deliver((chunk("a", 1),))
            tokens, error = await read(queue)
            assert (tokens, type(error)) == ([100], EngineDead)

    asyncio.run(run())
