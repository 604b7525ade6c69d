"""What one gRPC client does, key or not, reaches no other client's stream."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.watches import MAX_OF_ALL, MAX_OF_CALLER
from tests.raw_http2 import Sender
from tests.waiting import wait_for

NUM_STREAMS = 12
REPEATS = 50
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


class Stream:
    """A client with one long answer after the other until it is closed, on a connection of its own."""

    def __init__(self, address: str) -> None:
        self.num_chunks = 0
        self.broken_off: grpc.StatusCode | None = None  # an answer was, with this
        self._is_closed = False
        self._channel = grpc.insecure_channel(address, OWN_CONNECTION)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        sampling = chat_pb2.Sampling(temperature=0.0, max_tokens=3500, ignore_eos=True)
        request = chat_pb2.GenerateRequest(model="mistral-tiny", text="Once upon a time", sampling=sampling)
        stub = chat_pb2_grpc.MantaStub(self._channel)
        try:
            while not self._is_closed:
                for _ in stub.GenerateStream(request, timeout=300):
                    self.num_chunks += 1
                    if self._is_closed:
                        return
        except grpc.RpcError as error:
            self.broken_off = error.code()

    def close(self) -> None:
        self._is_closed = True
        self._thread.join(30)
        self._channel.close()


@contextmanager
def streams(address: str) -> Iterator[list[Stream]]:
    running = [Stream(address) for _ in range(NUM_STREAMS)]
    try:
        wait_for(lambda: all(stream.num_chunks for stream in running), 120, "the first tokens")
        yield running
    finally:
        for stream in running:
            stream.close()


def long_service(channel: grpc.Channel) -> None:
    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x" * 17_000), timeout=60)


def foreign_application(channel: grpc.Channel) -> None:
    metadata = (("application", "%" * 6000),)
    stub = chat_pb2_grpc.MantaStub(channel)
    stub.Chat(chat_pb2.ChatRequest(model="nobody"), metadata=metadata, timeout=60)


def long_request_id(channel: grpc.Channel) -> None:
    metadata = (("request_id", "%" * 6000), ("multiplexed_model_id", "%" * 6000))
    stub = chat_pb2_grpc.MantaStub(channel)
    stub.Chat(chat_pb2.ChatRequest(model="x" * 3000), metadata=metadata, timeout=60)


def model_of_emoji(channel: grpc.Channel) -> None:
    chat_pb2_grpc.MantaStub(channel).Chat(chat_pb2.ChatRequest(model="🦑" * 2000), timeout=60)


def role_of_emoji(channel: grpc.Channel) -> None:
    message = chat_pb2.Message(role="🦑" * 2000, content="Hello")
    request = chat_pb2.ChatRequest(model="mistral-tiny", messages=[message])
    list(chat_pb2_grpc.MantaStub(channel).ChatStream(request, timeout=60))


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (long_service, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (foreign_application, grpc.StatusCode.NOT_FOUND),
        (long_request_id, grpc.StatusCode.NOT_FOUND),
        (model_of_emoji, grpc.StatusCode.NOT_FOUND),
        (role_of_emoji, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_no_answer_to_one_client_ends_the_streams_of_others(
    server, ask: Callable[[grpc.Channel], None], code: grpc.StatusCode
) -> None:
    """HAProxy closes a connection to a replica whose headers or trailers it cannot hold. All clients shared a few of
    them, and what was repeated in an error's details took up to twelve bytes a character: 8 to 24 calls of anyone,
    without a key, ended 12 of 12 streams."""
    with streams(server.grpc_address) as running:
        codes = Counter(refusal(server.grpc_address, ask) for _ in range(REPEATS))
        before = [stream.num_chunks for stream in running]
        wait_for(
            lambda: all(
                stream.broken_off or stream.num_chunks > count for stream, count in zip(running, before, strict=True)
            ),
            60,
            "more tokens of every stream",
        )
        assert [stream.broken_off for stream in running] == [None] * NUM_STREAMS
    assert codes == {code: REPEATS}


def refusal(address: str, ask: Callable[[grpc.Channel], None]) -> grpc.StatusCode:
    with grpc.insecure_channel(address, OWN_CONNECTION) as channel, pytest.raises(grpc.RpcError) as refused:
        ask(channel)
    return refused.value.code()


@pytest.mark.parametrize("num_connections", [5, pytest.param(50, marks=pytest.mark.long)])
def test_watches_take_no_place_of_requests(server, num_connections) -> None:
    """Each lasts ten minutes, and to Serve it is a request: with 44 connections of 100 a gateway answered nobody."""
    senders = [Sender() for _ in range(num_connections)]
    seen = threading.Event()

    async def watch() -> None:
        path = "/grpc.health.v1.Health/Watch"
        await asyncio.gather(
            *(sender.send(server.grpc_address, path, 100, b"", until=seen.is_set) for sender in senders)
        )

    def is_settled() -> bool:
        assert stub.Generate(request, timeout=30).usage.completion_tokens
        try:
            assert next(health.Watch(health_pb2.HealthCheckRequest(), timeout=30)).status
        except grpc.RpcError:  # one more of those that are too many
            return False
        is_sent = sum(sender.num_bytes for sender in senders) == num_connections * 100 * 5
        num_open = [sender.num_open for sender in senders]
        return is_sent and max(num_open) <= MAX_OF_CALLER and sum(num_open) <= MAX_OF_ALL

    sampling = chat_pb2.Sampling(max_tokens=2)
    request = chat_pb2.GenerateRequest(model="mistral-tiny", text="Once upon a time", sampling=sampling)
    with ThreadPoolExecutor(1) as beside, grpc.insecure_channel(server.grpc_address, OWN_CONNECTION) as channel:
        stub, health = chat_pb2_grpc.MantaStub(channel), health_pb2_grpc.HealthStub(channel)
        watching = beside.submit(asyncio.run, watch())
        try:
            wait_for(is_settled, 60, "the watches that are too many to end")
        finally:
            seen.set()
        watching.result()
