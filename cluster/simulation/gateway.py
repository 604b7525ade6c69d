"""A gateway under simulated time: the product's inbox, streams, choice of a coordinator and resumption; its clients.

Serve's handle is the only thing that is not the product's: a call reaches a coordinator that the router knows, and ends
with an answer, with the loss of the coordinator as soon as Ray notices it, or when it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Set
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from cluster.deadline import Deadline
from cluster.errors import CoordinatorLost, MantaError
from cluster.messages import Request, SamplingParams, TokenChunk, TokenStream
from cluster.simulation.coordinator import Coordinator, received
from cluster.simulation.world.network import Connection, Network
from cluster.simulation.world.processes import Process
from gateway.coordinators import resumption
from gateway.coordinators.choice import prefix_of, ranked
from gateway.coordinators.client import StreamingClient
from gateway.coordinators.table import CoordinatorTable
from gateway.coordinators.token_inbox import TokenInbox
from gateway.coordinators.token_streams import TokenStreams
from gateway.deadline import DeadlineTimer

APPLICATION = "model"
ROUTER_PAUSE_S = 0.05  # between two looks for a coordinator, while none is known


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as a client sends it."""

    at: float
    name: str
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0  # requests of one number begin alike
    tenant: str = ""
    timeout_s: float = 120.0


class ClientObserver(Protocol):
    """Is told what clients get."""

    def began(self, arrival: Arrival, request: Request) -> None:
        """A gateway has taken it."""

    def received(self, name: str, chunk: TokenChunk) -> None:
        """Tokens have come for it."""

    def ended(self, name: str, error: MantaError | None) -> None:
        """It is complete, or has failed."""


class Gateway:
    """One replica."""

    def __init__(
        self,
        process: Process,
        network: Network,
        coordinators: Callable[[str], Coordinator | None],
        observer: ClientObserver,
        notice_s: Callable[[str], float],
        resume_timeout_s: float = 300.0,
    ) -> None:
        """`coordinators`: the live one of that name. `notice_s`: after how long Ray says that one has died."""
        self.process = process
        self.table = CoordinatorTable()
        self.inbox = TokenInbox(self.table, process.name)
        self.client = Client(self, network, coordinators, notice_s)
        self.streams = TokenStreams(APPLICATION, self.inbox, self.table, self.client.open_stream)
        self._observer = observer
        self._resume_timeout_s = resume_timeout_s
        self.ongoing: set[str] = set()
        process.do(lambda: process.loop.call_soon(self.streams.start))

    def take(self, arrival: Arrival) -> None:
        """A client's request has come."""
        if self.process.runs:
            self.process.loop.create_task(self._answer(arrival))

    async def _answer(self, arrival: Arrival) -> None:
        own, number = hash_of(arrival.name), arrival.prompt_tokens
        request = Request(
            arrival.name,
            (*range(arrival.prefix, arrival.prefix + min(32, number)), *range(own + 32, own + number)),
            _sampling(arrival.output_tokens),
            seed=own,
            deadline=Deadline(self.process.clock() + arrival.timeout_s),
            cache_salt=arrival.tenant,
        )
        self.ongoing.add(arrival.name)
        self._observer.began(arrival, request)
        error: MantaError | None = None
        try:
            with DeadlineTimer(request.deadline) as timer:
                stream = resumption.generate(self.client, request, self._resume_timeout_s)
                async with aclosing(stream):
                    while True:
                        try:
                            chunk = await timer.next(stream)
                        except StopAsyncIteration:
                            break
                        self._observer.received(arrival.name, chunk)
        except MantaError as failure:
            error = failure
        self.ongoing.discard(arrival.name)
        self._observer.ended(arrival.name, error)


class Client(StreamingClient):
    """Calls of coordinators, as Serve's handle makes them."""

    def __init__(
        self,
        gateway: Gateway,
        network: Network,
        coordinators: Callable[[str], Coordinator | None],
        notice_s: Callable[[str], float],
    ) -> None:
        super().__init__(gateway.inbox)
        self._gateway = gateway
        self._network = network
        self._notice_s = notice_s
        self._coordinators = coordinators
        self._ongoing: Counter[str] = Counter()
        self._listed: frozenset[str] = frozenset()
        self._sorted: list[str] = []
        self._died: set[str] = set()  # Serve's router drops a replica whose actor it was told has died
        self._chance = gateway.process.queue.chance(f"{gateway.process.name}/router")
        self.num_calls = 0

    def ask(self, request: Request) -> Any:
        return _Call(self, request)

    def meaning(self, error: BaseException) -> BaseException:
        return error

    def coordinators(self) -> Set[str]:
        return self._gateway.table.coordinators(APPLICATION)

    def open_stream(self, stream: TokenStream) -> AsyncIterator[tuple[TokenChunk, ...]]:
        return _Stream(self, stream)

    async def call(self, call: _Call) -> Any:
        """Have the router choose a coordinator, and wait for what it answers."""
        process, table, request = self._gateway.process, self._gateway.table, call.request
        while True:
            await asyncio.sleep(0)
            listed = table.coordinators(APPLICATION)
            if listed is not self._listed:
                self._listed, self._sorted = listed, sorted(listed)
                self._died &= listed
            known = [name for name in self._sorted if name not in self._died] if self._died else self._sorted
            if known:
                break
            await asyncio.sleep(ROUTER_PAUSE_S)
        ranks = ranked(
            known,
            self._ongoing,
            table.silent,
            failed_on=request.failed_on,
            prefix=prefix_of(request),
            sample=self._chance.sample,
        )
        name = min(ranks[0], key=self._ongoing.__getitem__)
        table.sent(request.key, name)
        self._ongoing[name] += 1
        self.num_calls += 1
        answer = call.answer = process.loop.create_future()
        coordinator = self._coordinators(name)
        try:
            if coordinator is None:
                await asyncio.sleep(self._notice_s(name))
                self._died.add(name)
                raise CoordinatorLost("the model's coordinator was lost while it answered")
            self._connect(call, coordinator, answer)
            return await answer
        finally:
            self._ongoing[name] = max(0, self._ongoing[name] - 1)
            call.hang_up()

    def _connect(self, call: _Call, coordinator: Coordinator, answer: asyncio.Future[Any]) -> None:
        here, there = self._gateway.process, coordinator.process
        connection = call.connection = self._network.connect(here, there)
        asked = received(call.request, here, there)

        def reply(result: MantaError | None) -> None:
            if not answer.done():
                answer.set_result(result)

        def lose() -> None:
            if not there.is_alive:
                self._died.add(there.name)
            if not answer.done():
                answer.set_exception(CoordinatorLost("the model's coordinator was lost while it answered"))

        def begin() -> None:
            task = there.loop.create_task(coordinator.generate(asked, self._gateway.inbox.id))
            connection.on_close[there] = task.cancel

            def end(task: asyncio.Task[Any]) -> None:
                if not task.cancelled():
                    connection.send(there, reply, task.result())

            task.add_done_callback(end)

        connection.on_close[here] = lose
        connection.send(here, begin)

    def read(self, stream: _Stream) -> None:
        """Begin to read the tokens of one coordinator."""
        here = self._gateway.process
        coordinator = self._coordinators(stream.asked.coordinator)
        if coordinator is None:
            here.after(self._notice_s(stream.asked.coordinator), stream.put, None)
            return
        there = coordinator.process
        connection = stream.connection = self._network.connect(here, there)
        connection.on_close[here] = lambda: stream.put(None)

        async def write() -> None:
            try:
                async with aclosing(coordinator.token_stream(stream.asked)) as items:
                    async for item in items:
                        connection.send(there, stream.put, item)
            finally:
                if there.is_alive:
                    connection.close(there)

        def begin() -> None:
            connection.on_close[there] = there.loop.create_task(write()).cancel

        connection.send(here, begin)

    def hang_up(self, connection: Connection) -> None:
        if self._gateway.process.is_alive:
            connection.close(self._gateway.process)


class _Call:
    """A call that can be awaited once, and cancelled."""

    def __init__(self, client: Client, request: Request) -> None:
        self.request = request
        self.answer: asyncio.Future[Any] | None = None
        self.connection: Connection | None = None
        self._client = client
        self._is_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._client.call(self).__await__()

    def cancel(self) -> None:
        self._is_cancelled = True
        self.hang_up()
        if self.answer is not None and not self.answer.done():
            self.answer.cancel()

    def hang_up(self) -> None:
        if self.connection is not None:
            self._client.hang_up(self.connection)


class _Stream:
    """Items of one coordinator, as they come; None: there are no more."""

    def __init__(self, client: Client, asked: TokenStream) -> None:
        self.asked = asked
        self.connection: Connection | None = None
        self._client = client
        self._items: deque[tuple[TokenChunk, ...] | None] = deque()
        self._arrived: asyncio.Future[None] | None = None
        client.read(self)

    def put(self, item: tuple[TokenChunk, ...] | None) -> None:
        self._items.append(item)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def __aiter__(self) -> AsyncIterator[tuple[TokenChunk, ...]]:
        return self

    async def __anext__(self) -> tuple[TokenChunk, ...]:
        if not self._items:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        item = self._items.popleft()
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        if self.connection is not None:
            self._client.hang_up(self.connection)


@cache
def _sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(num_tokens)


def hash_of(name: str) -> int:
    """The same in every process."""
    number = 0
    for character in name:
        number = (number * 131 + ord(character)) % 1_000_003
    return number
