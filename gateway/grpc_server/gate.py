"""Stands before every RPC of a server: first the key, from the metadata, then the message, bounded, then Serve.

    metadata ─▶ key ─▶ a slot to read ─▶ bytes ─▶ how many parts ─▶ message ─▶ Serve's handler, with a FittingContext

It takes each handler that does not stream its requests for one that does, as only such a handler is called before a
message is read. A message that nobody reads stays behind HTTP/2's flow control, 64 KiB of it here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.config import GatewayConfig
from cluster.errors import InvalidRequest, Overloaded, PayloadTooLarge, RequestCancelled
from gateway import chat_pb2
from gateway.grpc_errors import retry_after, status_of
from gateway.grpc_guard import identify, traceparent
from gateway.grpc_server.slots import ReadSlots
from gateway.grpc_server.trailers import FittingContext
from gateway.grpc_server.wire_bounds import check_parts, parts_of
from gateway.guard import Guard
from gateway.logs import RequestRecord, open_record
from gateway.metrics import error_name

PUBLIC_READS = 4  # messages at a time of those whose sender nobody knows
PUBLIC_READ_S = 5.0
PUBLIC_MESSAGE_BYTES = 4096  # a service's name
INLINE_BYTES = 64 * 1024  # a larger message is taken apart in a thread, so that other streams go on

_SERVICE = chat_pb2.DESCRIPTOR.services_by_name["Manta"]
GUARDED = {f"/{_SERVICE.full_name}/{rpc.name}": parts_of(rpc.input_type) for rpc in _SERVICE.methods}


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """One per server. Without `guard`, where no key can be checked, that is left to the RPCs."""

    def __init__(self, config: GatewayConfig, guard: Guard | None) -> None:
        self._guard = guard
        self._max_bytes = config.max_body_bytes
        self._max_bytes_of_all = config.max_bytes_received
        self._num_bytes = 0  # of messages that no answer has been begun for
        # What is being read is held twice for a moment, by gRPC and as Python's bytes.
        self._reads = ReadSlots(max(1, config.max_bytes_received // config.max_body_bytes // 2), config.body_timeout_s)
        self._public_reads = ReadSlots(PUBLIC_READS, PUBLIC_READ_S)

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
            held = 0
            try:
                message, held = await self._message(method, handler.request_deserializer, context)
                return await handler.unary_unary(message, FittingContext(context))
            finally:
                self._num_bytes -= held

        return answer

    def _streaming(self, method: str, handler: Any) -> Callable[..., AsyncGenerator[Any, None]]:
        async def answer(_messages: Any, context: Any) -> AsyncGenerator[Any, None]:
            held = 0
            try:
                message, held = await self._message(method, handler.request_deserializer, context)
                await context.send_initial_metadata(())  # no proxy between waits for the first token in vain
                async with aclosing(handler.unary_stream(message, FittingContext(context))) as answers:
                    async for one in answers:
                        self._num_bytes -= held
                        held = 0
                        yield one
            finally:
                self._num_bytes -= held

        return answer

    async def _message(self, method: str, deserialize: Callable[[bytes], Any], context: Any) -> tuple[Any, int]:
        """The RPC's message, and how many bytes of it count as held. Ends the RPC where there is something wrong."""
        record = open_record(RequestRecord("grpc", method.rpartition("/")[2], traceparent=traceparent(context)))
        try:
            if method in GUARDED:
                return await self._guarded_message(method, deserialize, context)
            async with self._public_reads.slot(context.peer()):
                data = await _read(context, PUBLIC_MESSAGE_BYTES)
            return _parsed(deserialize, data), 0
        except Exception as error:
            request_id = f"req-{uuid.uuid4().hex}"
            status = status_of(error, request_id)
            record.request_id, record.status, record.error = request_id, status[0].name, error_name(error)
            record.write()
            await context.abort(*status, (("x-request-id", request_id), *retry_after(error)))
            raise AssertionError("an abort ends the RPC") from None

    async def _guarded_message(self, method: str, deserialize: Callable[[bytes], Any], context: Any) -> tuple[Any, int]:
        key = None if self._guard is None else identify(self._guard, context)
        async with self._reads.slot(context.peer() if key is None else key.id):
            data = await _read(context, self._max_bytes)
        if self._num_bytes + len(data) > self._max_bytes_of_all:
            raise Overloaded("too many large requests are being received; try again later")
        self._num_bytes += len(data)
        try:
            if len(data) <= INLINE_BYTES:
                return _checked(method, deserialize, data), len(data)
            return await asyncio.to_thread(_checked, method, deserialize, data), len(data)
        except BaseException:
            self._num_bytes -= len(data)
            raise


async def _read(context: Any, max_bytes: int) -> bytes:
    data = await context.read()
    if data is grpc.aio.EOF:
        raise RequestCancelled("no message was sent")
    if len(data) > max_bytes:
        raise PayloadTooLarge(f"the message is over the limit of {max_bytes} bytes")
    return bytes(data)


def _checked(method: str, deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    check_parts(data, GUARDED[method])
    return _parsed(deserialize, data)


def _parsed(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidRequest(f"the message cannot be decoded: {error}") from None
