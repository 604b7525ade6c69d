"""Before an RPC: the key before the message, bounds before it is built, and answers that fit into HTTP/2's headers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import GatewayConfig
from cluster.errors import BodyTimeout, InvalidRequest, Overloaded
from cluster.messages import ModelCard
from gateway.admission.api_keys import digest, new_key
from gateway.grpc import trailers
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.server import wire_bounds
from gateway.grpc.server.gate import METHODS, Gate
from gateway.grpc.server.slots import ReadSlots
from gateway.grpc.server.wire_bounds import check_parts, parts_of
from gateway.grpc.trailers import FittingContext, fitting_details, fitting_metadata
from gateway.grpc.watches import MAX_OF_ALL, MAX_OF_CALLER, Watches
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, held_script, tokens_script
from tests.gateway.grpc.test_grpc import grpc_address, grpc_server
from tests.raw_http2 import Sender
from tests.waiting import wait_for

SERVICE = chat_pb2.DESCRIPTOR.services_by_name["Manta"]
NEVER = threading.Event()
REQUEST = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hello")])


@pytest.fixture
def coordinator(tokenizer: HuggingFaceTokenizer) -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))


@pytest.fixture
def key() -> str:
    return new_key()


@pytest.fixture
def keys_file(tmp_path: Path, key: str) -> Path:
    file = tmp_path / "keys.json"
    file.write_text(f'[{{"id": "alice", "sha256": "{digest(key)}"}}]')
    return file


def no_message() -> Iterator[bytes]:
    """A client that began a message and does not send it."""
    NEVER.wait(30)
    yield b""


def test_the_key_is_checked_before_a_message_is_read(
    card: ModelCard, coordinator: ScriptedCoordinator, keys_file: Path, key: str
) -> None:
    """gRPC reads a message whole before it calls who serves it: 8 of 63 MiB, without a key, took 1.3 GB."""
    with grpc_server(build_frontend(card, coordinator, GatewayConfig(api_keys_file=keys_file))) as channel:
        for rpc in SERVICE.methods:
            make: Any = channel.stream_stream if rpc.server_streaming else channel.stream_unary
            for metadata in ((), (("authorization", "Bearer wrong"),)):
                call = make(f"/{SERVICE.full_name}/{rpc.name}")
                with pytest.raises(grpc.RpcError) as refused:
                    list(call(no_message(), metadata=metadata, timeout=20))
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, rpc.name
                assert "x-request-id" in dict(refused.value.trailing_metadata())
        metadata = (("authorization", f"Bearer {key}"),)
        assert chat_pb2_grpc.MantaStub(channel).Chat(REQUEST, metadata=metadata).choices


def test_every_rpc_of_ours_is_known_to_the_gate() -> None:
    assert set(METHODS) == {f"/manta.v1.Manta/{rpc.name}" for rpc in SERVICE.methods}


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\x05\x0a", b"\x0b"])
def test_what_cannot_be_decoded_is_an_invalid_argument(
    card: ModelCard, coordinator: ScriptedCoordinator, data: bytes
) -> None:
    """It was INTERNAL or UNKNOWN, with the class of the parser's error."""
    with grpc_server(build_frontend(card, coordinator)) as channel:
        for rpc in SERVICE.methods:
            if rpc.name == "ListModels" and data == b"\x0a\x02\xff\xfe":
                continue  # a field that is not known there
            make: Any = channel.unary_stream if rpc.server_streaming else channel.unary_unary
            with pytest.raises(grpc.RpcError) as refused:
                list(make(f"/{SERVICE.full_name}/{rpc.name}")(data, timeout=10))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, rpc.name
            told = {"it is cut short", "it is none of the type that this method takes"}
            assert refused.value.details().removeprefix("the message cannot be decoded: ") in told
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/grpc.health.v1.Health/Check")(data, timeout=10)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert chat_pb2_grpc.MantaStub(channel).Chat(REQUEST).choices


MANY = wire_bounds.MAX_SUBMESSAGES + 1


def inside(tag: bytes, parts: bytes) -> bytes:
    """A submessage of these."""
    size, length = bytearray(), len(parts)
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return tag + bytes((*size, length)) + parts


@pytest.mark.parametrize(
    ("rpc", "data", "named"),
    [
        ("Chat", b"\x12\x00" * (3 * 2**20), "messages"),
        ("ChatStream", b"\x22\x00" * MANY, "tools"),
        ("Chat", inside(b"\x12", b"\x1a\x00" * MANY), "tool_calls"),
        ("Chat", inside(b"\x1a", b"\x52\x00" * MANY), "logit_bias"),
        ("Chat", b"\x1a\x00" * MANY, "sampling"),
        ("Embed", b"\x12\x00" * MANY, "inputs"),
        ("Generate", b"\x1a\x00" * MANY, "token_ids"),
        ("Tokenize", inside(b"\x1a", b"\x0a\x00" * MANY), "messages"),
        ("Detokenize", b"\x10\x01" * (3 * 2**20), "fields"),
        ("Detokenize", inside(b"\x12", b"\x01" * (wire_bounds.MAX_NUMBERS + 1)), "token_ids: more than 524288 numbers"),
        ("Generate", inside(b"\x1a", inside(b"\x0a", b"\xff\x01" * (wire_bounds.MAX_NUMBERS + 1))), "ids: more than"),
        ("Embed", inside(b"\x12", inside(b"\x12", inside(b"\x0a", b"\x01" * 9000))) * 60, "ids: more than"),
        ("Chat", b"\xa0\x06\x01" * (2 * 2**20), "fields"),  # of a number that nobody knows
        # A parser builds the calls before it comes to what is wrong: 8 MiB of them took 300 MB and the interpreter.
        ("Chat", inside(b"\x12", b"\x1a\x00" * 2**20) + b"\x80", "cut short"),
        ("Chat", inside(b"\x12", b"\x1a\x00" * MANY) + b"\x80" * 5 + b"\x7f\x00", "tool_calls"),
    ],
    ids=range(15),
)
def test_a_message_of_too_many_parts_is_refused_before_it_is_built(
    card: ModelCard, coordinator: ScriptedCoordinator, rpc: str, data: bytes, named: str
) -> None:
    """An empty submessage is two bytes on the wire and 140 in memory: 32 MiB of them took 2.3 GB."""
    with grpc_server(build_frontend(card, coordinator)) as channel:
        make: Any = channel.unary_stream if rpc.endswith("Stream") else channel.unary_unary
        with pytest.raises(grpc.RpcError) as refused:
            list(make(f"/manta.v1.Manta/{rpc}")(data, timeout=30))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert named in refused.value.details()


def test_as_many_parts_as_allowed_are_taken_and_a_part_of_a_message_is_refused() -> None:
    message = chat_pb2.Message(role="user", content="x", tool_calls=[chat_pb2.ToolCall(id="1")])
    request = chat_pb2.ChatRequest(model="m" * 300, messages=[message] * (wire_bounds.MAX_SUBMESSAGES // 2))
    data = request.SerializeToString()
    known = parts_of(chat_pb2.ChatRequest.DESCRIPTOR)
    check_parts(data, known)
    for cut in range(0, 997, 10):
        try:
            check_parts(data[:cut], known)
        except InvalidRequest:
            with pytest.raises(DecodeError):
                chat_pb2.ChatRequest.FromString(data[:cut])
    with pytest.raises(InvalidRequest, match="messages"):
        check_parts(data + b"\x12\x00", known)
    with pytest.raises(InvalidRequest, match="cut short"):
        check_parts(b"\x80" * 1000, known)
    numbers = chat_pb2.TokenIds(ids=[2**31] * wire_bounds.MAX_NUMBERS)
    request = chat_pb2.GenerateRequest(model="m", token_ids=numbers)
    check_parts(request.SerializeToString(), parts_of(chat_pb2.GenerateRequest.DESCRIPTOR))


def test_details_and_metadata_fit_as_they_are_encoded() -> None:
    """Two thousand characters of a model's name were up to 24,000 bytes in a trailer; HAProxy takes 16,384."""
    for text in ("x" * 17_000, "%" * 6000, "🦑" * 2000, "é" * 5000, "\x00" * 5000, "\ud800" * 5000, "a🦑" * 900):
        kept = fitting_details(text)
        encoded = quote(kept.encode("utf-8", "replace"), safe="".join(map(chr, range(0x20, 0x7F))).replace("%", ""))
        assert text.startswith(kept)
        assert trailers.MAX_DETAILS_BYTES - 12 < len(encoded) <= trailers.MAX_DETAILS_BYTES
    assert fitting_details("unknown model 'x'") == "unknown model 'x'"
    entries = [("retry-after", "1"), ("a-bin", b"\0" * 2000), ("b", "x" * 2000), ("c", "y")]
    assert fitting_metadata(entries) == entries[:2]


class Context:
    """What Serve uses of a servicer's context."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self.metadata = metadata
        self.has_ended = False
        self.sent: dict[str, Any] = {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    def set_details(self, details: str) -> None:
        self.sent["details"] = details

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.sent["metadata"] = metadata

    def peer(self) -> str:
        assert not self.has_ended, "grpc.aio reads memory that was freed"
        return "ipv4:127.0.0.1:1"


def test_serve_sees_no_command_of_a_client_and_sends_nothing_that_is_too_long() -> None:
    kept = (("authorization", "Bearer x"), ("traceparent", "00-1"), ("request_id", "mine-1"))
    context = Context(*kept, ("application", "gateway"), ("multiplexed_model_id", "m"), ("session_id", "s"))
    fitting = FittingContext(context)
    assert fitting.invocation_metadata() == kept
    context.has_ended = True
    assert fitting.peer() == "ipv4:127.0.0.1:1", "asked late, it took down Serve's proxy with every stream of it"
    fitting.set_details("%" * 6000)
    assert len(context.sent["details"]) == trailers.MAX_DETAILS_BYTES // 3
    fitting.set_trailing_metadata([("request_id", "r"), ("x", "y" * 8000)])
    assert context.sent["metadata"] == (("request_id", "r"),)
    assert FittingContext(Context(("request_id", "%" * 200))).invocation_metadata() == ()


def test_messages_that_wait_for_an_answer_are_bounded_in_all(card: ModelCard) -> None:
    """And who fills the room keeps nobody else out of it."""
    may_answer = threading.Event()
    coordinator = ScriptedCoordinator(held_script(may_answer))
    config = GatewayConfig(max_body_bytes=2**20, max_bytes_received=2**20)
    small = REQUEST.SerializeToString()
    large = small + inside(b"\xa2\x06", b"x" * 600_000)  # a field that nobody knows
    with grpc_address(build_frontend(card, coordinator, config)) as address, ExitStack() as stack:
        eve, alice = (
            stack.enter_context(grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])).unary_unary(
                "/manta.v1.Manta/Chat"
            )
            for _ in range(2)
        )
        first = eve.future(large, timeout=30)
        wait_for(lambda: coordinator.running == 1, 60, "the first to run")
        with pytest.raises(grpc.RpcError) as refused:
            eve(large, timeout=30)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "retry-after" in dict(refused.value.trailing_metadata())
        other = alice.future(large, timeout=30)
        wait_for(lambda: coordinator.running == 2, 60, "another's to run")
        may_answer.set()
        assert first.result()
        assert other.result()
        assert eve(large, timeout=30), "what was held is given back"


def test_what_says_nothing_is_answered_unread(card: ModelCard, coordinator: ScriptedCoordinator) -> None:
    """HAProxy takes a replica that is slow to say that it lives out of service, and anyone may ask."""
    with grpc_server(build_frontend(card, coordinator)) as channel:
        data = channel.stream_unary("/grpc.health.v1.Health/List")(no_message(), timeout=20)
        assert health_pb2.HealthListResponse.FromString(data).statuses[""].status == 1


def test_slow_senders_hold_up_nobody() -> None:
    """Each message that is being read counts as the largest, so those who are slow would fill all room for ever."""

    async def read(reads: ReadSlots, tenant: str, seconds: float) -> str:
        try:
            async with reads.slot(tenant):
                await asyncio.sleep(seconds)
        except BodyTimeout:
            return "ended"
        return "read"

    async def run() -> None:
        reads = ReadSlots(4, max_waiting=99, timeout_s=60, grace_s=0.02)
        assert await asyncio.gather(*(read(reads, "alice", 0) for _ in range(100))) == ["read"] * 100
        slow = [asyncio.create_task(read(reads, f"eve-{i}", 60)) for i in range(40)]
        await asyncio.sleep(0)
        started = time.monotonic()
        assert await read(reads, "alice", 0) == "read"
        assert time.monotonic() - started < 10
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        patient = [asyncio.create_task(read(reads, "eve", 0.2)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await read(reads, "alice", 0) == "read"
        assert await asyncio.gather(*patient) == ["read"] * 2, "nobody waits for these"
        assert await read(ReadSlots(4, max_waiting=99, timeout_s=0.02, grace_s=0.02), "eve", 60) == "ended"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_who_has_most_messages_waiting_is_refused() -> None:
    """Each waits on a connection of HAProxy's, of which a replica has so many."""

    async def read(reads: ReadSlots, tenant: str, may_end: asyncio.Event) -> str:
        try:
            async with reads.slot(tenant):
                await may_end.wait()
        except Overloaded:
            return "refused"
        return "read"

    async def run() -> None:
        reads, may_end = ReadSlots(4, max_waiting=10, timeout_s=60, grace_s=60), asyncio.Event()
        eve = [asyncio.create_task(read(reads, "eve", may_end)) for _ in range(30)]
        await asyncio.sleep(0)
        alice = [asyncio.create_task(read(reads, "alice", may_end)) for _ in range(3)]
        await asyncio.sleep(0)
        may_end.set()
        assert await asyncio.gather(*alice) == ["read"] * 3
        assert Counter(await asyncio.gather(*eve)) == {"read": 11, "refused": 19}
        assert await read(reads, "eve", may_end) == "read"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_one_that_leaves_when_its_turn_has_come_passes_it_on() -> None:
    """Its turn was lost then, and who came after it waited for a message of somebody else."""

    async def read(reads: ReadSlots, tenant: str, may_end: asyncio.Event) -> str:
        async with reads.slot(tenant):
            await may_end.wait()
        return tenant

    async def run() -> None:
        for num_ticks in range(8):
            reads, may_end = ReadSlots(1, max_waiting=10, timeout_s=60, grace_s=60), asyncio.Event()
            tasks = [asyncio.create_task(read(reads, tenant, may_end)) for tenant in ("alice", "bob", "carol")]
            await asyncio.sleep(0.01)
            may_end.set()
            for _ in range(num_ticks):
                await asyncio.sleep(0)
            tasks[1].cancel()
            assert await asyncio.wait_for(tasks[2], 5) == "carol", num_ticks
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_stream_has_its_headers_before_its_first_token(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """Nothing came before the first token, and a proxy that waits for an answer's head cut a long prefill."""
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:], pause_s=60))
    with grpc_server(build_frontend(card, coordinator)) as channel:
        stream = chat_pb2_grpc.MantaStub(channel).ChatStream(REQUEST, timeout=30)
        started = time.monotonic()
        assert stream.initial_metadata() is not None
        assert time.monotonic() - started < 10
        assert stream.is_active()
        stream.cancel()


def test_a_silent_connection_is_pinged(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    """A proxy between closes what says nothing for a while, and a long prompt's answer says nothing."""
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:], pause_s=60))
    sender = Sender()

    async def watch(address: str) -> None:
        path, message = "/manta.v1.Manta/ChatStream", REQUEST.SerializeToString()
        await asyncio.wait_for(sender.send(address, path, 1, message, until=lambda: sender.num_pings >= 2), 20)

    with grpc_address(build_frontend(card, coordinator, GatewayConfig(keepalive_s=0.3))) as address:
        asyncio.run(watch(address))
    assert sender.num_ended == 0


def test_an_error_that_nobody_foresaw_is_internal_and_says_no_more() -> None:
    """grpc.aio answers with the class and the text of what was raised, however long."""

    async def run() -> None:
        class Health(health_pb2_grpc.HealthServicer):
            async def Check(self, request: Any, context: Any) -> None:  # noqa: N802
                raise RuntimeError("secret" * 10_000)

            async def Watch(self, request: Any, context: Any) -> Any:  # noqa: N802
                raise RuntimeError("secret" * 10_000)
                yield

        server = grpc.aio.server(interceptors=(Gate(GatewayConfig(), None),))
        health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as unary:
                await stub.Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.aio.AioRpcError) as stream:
                await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))
        await server.stop(0)
        for failed in (unary.value, stream.value):
            assert failed.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in (failed.details() or "")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_watches_are_bounded_for_each_caller_and_in_all() -> None:
    """A watch lasts ten minutes and holds a place among Serve's requests: 44 connections filled a gateway."""
    watches = Watches()
    with ExitStack() as stack:
        eve = [stack.enter_context(watches.place("eve")) for _ in range(MAX_OF_CALLER)]
        with pytest.raises(Overloaded, match="of one connection"):
            stack.enter_context(watches.place("eve"))
        others = [stack.enter_context(watches.place(f"peer-{i}")) for i in range(MAX_OF_ALL - MAX_OF_CALLER)]
        assert not any(over.is_set() for over in (*eve, *others))
        stack.enter_context(watches.place("alice"))
        assert [over.is_set() for over in eve] == [True, False, False, False], "the oldest of who has most"
        assert not any(over.is_set() for over in others)
    for _ in range(3 * MAX_OF_ALL):
        with watches.place("eve"):
            pass


def test_a_watch_that_lost_its_place_and_one_too_many_end(card: ModelCard, coordinator: ScriptedCoordinator) -> None:
    frontend = build_frontend(card, coordinator)
    with grpc_server(frontend) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watching = [health.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(MAX_OF_CALLER)]
        assert [next(watch).status for watch in watching] == [1] * MAX_OF_CALLER
        with pytest.raises(grpc.RpcError) as refused:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        watching[0].cancel()

        def has_room() -> bool:
            try:
                return bool(next(health.Watch(health_pb2.HealthCheckRequest(), timeout=30)).status)
            except grpc.RpcError:
                return False

        wait_for(has_room, 60, "room")


def test_health_is_for_this_machine_only_where_it_is_over_http(
    card: ModelCard, coordinator: ScriptedCoordinator
) -> None:
    """A server that listens elsewhere without keys answers nobody; its health was told to everyone over gRPC."""
    with grpc_server(build_frontend(card, coordinator, GatewayConfig(host="0.0.0.0"))) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        calls: list[Callable[[], Any]] = [
            lambda: health.Check(health_pb2.HealthCheckRequest()),
            lambda: health.List(health_pb2.HealthListRequest()),
            lambda: list(health.Watch(health_pb2.HealthCheckRequest())),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
