"""How a gRPC client that leaves reaches a stream. Knows Serve's gRPC server; knows nothing of what streams carry.

Serve (2.60) cancels a request when the cancellation finds it waiting for the next message. When it comes while a
message is being written instead, Serve's own generator is dropped there, and the replica would run the request to
its end. Serve calls `add_MantaServicer_to_server` where it serves gRPC: in its proxies and in our replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from gateway.grpc.proto.chat_pb2_grpc import add_MantaServicer_to_server as add_generated

Handler = Callable[..., AsyncGenerator[Any, None]]


def add_MantaServicer_to_server(servicer: Any, server: Any) -> None:  # noqa: N802  # the generated function's name
    """As the generated function, with streams that are cancelled wherever their client leaves."""
    make_handler = server.service_handler_factory

    def make_watched(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler: Callable[..., Any] = make_handler(service_method=service_method, streaming_type=streaming_type)
        return cancelled_when_dropped(handler) if streaming_type.name == "UNARY_STREAM" else handler

    server.service_handler_factory = make_watched
    try:
        add_generated(servicer, server)  # type: ignore[no-untyped-call]
    finally:
        server.service_handler_factory = make_handler


def cancelled_when_dropped(handler: Handler) -> Handler:
    """The same handler; a stream of it that is left early is cancelled while it waits for its next message."""

    async def watched(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        stream = handler(request, context)
        complete = False
        try:
            async for message in stream:
                yield message
            complete = True
        finally:
            if not complete:
                await _cancel(stream)

    return watched


async def _cancel(stream: AsyncGenerator[Any, None]) -> None:
    waiting = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)  # it waits now
    waiting.cancel()
    await asyncio.wait((waiting,))
    if not waiting.cancelled():
        waiting.exception()  # seen
    await stream.aclose()
