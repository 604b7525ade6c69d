"""gRPC's table from error class to status code, and how an RPC is failed. The only place that knows both."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MantaError,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    RequestCancelled,
    Unauthorized,
    Unavailable,
)
from gateway.grpc.trailers import fitting_details
from gateway.http.errors import INTERNAL_MESSAGE, REASON_HEADER, retry_after_seconds
from gateway.telemetry.metrics import error_reason

logger = logging.getLogger(__name__)

CODE: dict[type[MantaError], Any] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    PayloadTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class RpcFailed(Exception):
    """Ends an RPC whose status is set already: Serve takes code and details from the context."""


_own_server: ContextVar[bool] = ContextVar("own_server", default=False)


def note_own_server() -> None:
    """The RPC of this task came to this process's own server, not through Serve's proxy."""
    _own_server.set(True)


@contextmanager
def failing_stream() -> Iterator[None]:
    """Around the body of a streaming RPC: one that fails ends here, its status and trailing metadata with it.

    From a stream that comes through its proxy Serve takes the status only where an error is raised. Otherwise it would
    log that as its own failure, and drop the trailing metadata.
    """
    try:
        yield
    except RpcFailed:
        if not _own_server.get():
            raise


def status_of(error: BaseException, request_id: str) -> tuple[Any, str]:
    """(code, details). An error that nobody designed is logged, and tells the client only that it happened."""
    code = next((CODE[cls] for cls in type(error).__mro__ if cls in CODE), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("request %s failed", request_id, exc_info=error)
        return code, INTERNAL_MESSAGE.format(request_id=request_id)
    return code, str(error)


def error_metadata(error: BaseException) -> list[tuple[str, str]]:
    """Trailing metadata, as HTTP's headers: why, and when another try is worth it, in whole seconds."""
    seconds = retry_after_seconds(error)
    reason = (REASON_HEADER, error_reason(error))
    return [reason] if seconds is None else [reason, ("retry-after", str(seconds))]


async def fail(context: Any, code: Any, details: str) -> None:
    """Sets the status. A plain grpc.aio context ends the RPC here; Serve's only carries it, and the caller ends."""
    details = fitting_details(details)
    if hasattr(context, "abort"):
        await context.abort(code, details, context.trailing_metadata())
    context.set_code(code)
    context.set_details(details)
