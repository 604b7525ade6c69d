"""Stands before every RPC of a server: first the key, from the metadata, then the message, bounded, then Serve.

    metadata ─▶ key ─▶ a slot to read ─▶ bytes ─▶ how many parts ─▶ message ─▶ Serve's handler, with a FittingContext

It takes each handler that does not stream its requests for one that does, as only such a handler is called before a
message is read. A message that nobody reads stays behind HTTP/2's flow control, 64 KiB of it here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.config import GatewayConfig
from cluster.errors import NO_GATEWAY, InvalidRequest, PayloadTooLarge, RequestCancelled, Unavailable
from gateway.admission.access import AccessPolicy
from gateway.admission.held_bytes import HeldBytes
from gateway.grpc.authentication import connection, identify
from gateway.grpc.errors import error_metadata, note_own_server, status_of
from gateway.grpc.proto import chat_pb2
from gateway.grpc.server.slots import ReadSlots
from gateway.grpc.server.wire_bounds import check_parts, parts_of
from gateway.grpc.trailers import FittingContext
from gateway.telemetry.logs import RequestRecord
from gateway.telemetry.request_ends import RequestEnds

GRACE_S = 2.0  # for a message to arrive while others wait to be read
MAX_WAITING, MAX_PUBLIC_WAITING = 1024, 256  # to be read
PUBLIC_READS = 8  # messages at a time of those whose sender nobody knows
PUBLIC_READ_S, PUBLIC_GRACE_S = 5.0, 0.1
PUBLIC_MESSAGE_BYTES = 4096  # a service's name
INLINE_BYTES = 64 * 1024  # a larger message is taken apart in a thread, so that other streams go on
# Of Serve's proxy where nothing is deployed; what a client says of an application does not come so far.
_NO_APPLICATION = (
    "Application metadata not set. Ping /ray.serve.RayServeAPIService/ListApplications for available applications."
)

_SERVICE = chat_pb2.DESCRIPTOR.services_by_name["Manta"]
METHODS = {f"/{_SERVICE.full_name}/{rpc.name}": parts_of(rpc.input_type) for rpc in _SERVICE.methods}
# Their messages say nothing and are not read: HAProxy takes a replica that is slow to answer out of service.
EMPTY = frozenset(
    {
        "/ray.serve.RayServeAPIService/Healthz",
        "/ray.serve.RayServeAPIService/ListApplications",
        "/grpc.health.v1.Health/List",
    }
)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """One per server. Without `access`, where no key can be checked, that is left to the RPCs."""

    def __init__(self, config: GatewayConfig, access: AccessPolicy | None, ends: RequestEnds | None = None) -> None:
        """`ends` is told of what ends here, before an RPC; None, in Serve's proxies: such is logged only."""
        self._ends = ends or RequestEnds()
        self._access = access
        self._max_bytes = config.max_body_bytes
        self._bytes = HeldBytes(config.max_bytes_received)
        # What is being read is held twice for a moment, by gRPC and as Python's bytes.
        num_reads = max(1, config.max_bytes_received // config.max_body_bytes // 2)
        self._reads = ReadSlots(num_reads, MAX_WAITING, config.body_timeout_s, GRACE_S)
        self._public_reads = ReadSlots(PUBLIC_READS, MAX_PUBLIC_WAITING, PUBLIC_READ_S, PUBLIC_GRACE_S)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:  # unknown, or reflection, which is there without keys only
            return handler
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(details.method, handler), response_serializer=handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            self._unary(details.method, handler), response_serializer=handler.response_serializer
        )

    def _unary(self, method: str, handler: Any) -> Callable[..., Awaitable[Any]]:
        async def answer(_messages: Any, context: Any) -> Any:
            context = FittingContext(context)
            try:
                async with self._message(method, handler.request_deserializer, context) as (message, _):
                    response = await handler.unary_unary(message, context)
                _check_that_a_gateway_was_asked(context)
                return response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _end(method, context, error, self._ends)

        return answer

    def _streaming(self, method: str, handler: Any) -> Callable[..., AsyncGenerator[Any, None]]:
        async def answer(_messages: Any, context: Any) -> AsyncGenerator[Any, None]:
            context = FittingContext(context)
            note_own_server()
            try:
                async with self._message(method, handler.request_deserializer, context) as (message, release):
                    await context.send_initial_metadata(())  # no proxy between waits for the first token in vain
                    async with aclosing(handler.unary_stream(message, context)) as answers:
                        async for one in answers:
                            release()
                            yield one
                _check_that_a_gateway_was_asked(context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _end(method, context, error, self._ends)

        return answer

    @asynccontextmanager
    async def _message(
        self, method: str, deserialize: Callable[[bytes], Any], context: FittingContext
    ) -> AsyncGenerator[tuple[Any, Callable[[], None]], None]:
        """The RPC's message, and what says that an answer has begun. Raises MantaError."""
        if method not in METHODS:
            yield await self._public_message(method, deserialize, context), lambda: None
            return
        key = None if self._access is None else identify(self._access, context)
        tenant = connection(context) if key is None else key.id
        with self._bytes.of(tenant) as held:
            with self._counting_who_leaves(method):
                async with self._reads.slot(tenant):
                    data = await _read(context, self._max_bytes)
                held.add(len(data))
                if len(data) <= INLINE_BYTES:
                    message = _checked(method, deserialize, data)
                else:
                    message = await asyncio.to_thread(_checked, method, deserialize, data)
                del data
            yield message, held.release

    async def _public_message(self, method: str, deserialize: Callable[[bytes], Any], context: FittingContext) -> Any:
        if method in EMPTY:
            return deserialize(b"")
        with self._counting_who_leaves(method):
            async with self._public_reads.slot(connection(context)):
                data = await _read(context, PUBLIC_MESSAGE_BYTES)
        return _parsed(deserialize, data)

    @contextmanager
    def _counting_who_leaves(self, method: str) -> Iterator[None]:
        """While a message is read: a client that leaves then has a line of its own, as no RPC begins that would."""
        try:
            yield
        except asyncio.CancelledError as error:
            record = RequestRecord("grpc", method.rpartition("/")[2], f"req-{uuid.uuid4().hex}")
            record.fail(error)
            self._ends(record)
            raise


def _check_that_a_gateway_was_asked(context: FittingContext) -> None:
    """Raises Unavailable where Serve's proxy knew none: its NOT_FOUND tells clients not to try again."""
    if context.code() == grpc.StatusCode.NOT_FOUND and context.details() == _NO_APPLICATION:
        raise Unavailable(NO_GATEWAY)


async def _end(method: str, context: FittingContext, error: Exception, ends: RequestEnds) -> None:
    """With the error's status, a request id and a line in the log. Raises AbortError."""
    request_id = f"req-{uuid.uuid4().hex}"
    code, details = status_of(error, request_id)
    record = RequestRecord("grpc", method.rpartition("/")[2], request_id, code.name)
    record.fail(error)
    ends(record)
    await context.abort(code, details, (("x-request-id", request_id), *error_metadata(error)))


async def _read(context: FittingContext, max_bytes: int) -> bytes:
    data = await context.read()
    if data is grpc.aio.EOF:
        raise RequestCancelled("no message was sent")
    if len(data) > max_bytes:
        raise PayloadTooLarge(f"the message is over the limit of {max_bytes} bytes")
    return bytes(data)


def _checked(method: str, deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    check_parts(data, METHODS[method])
    return _parsed(deserialize, data)


def _parsed(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidRequest("the message cannot be decoded: it is none of the type that this method takes") from None
