"""HTTP's table from error class to status, and OpenAI's error body. The only place that knows both."""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import (
    BodyTimeout,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    MantaError,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    RequestCancelled,
    Unauthorized,
    Unavailable,
    UnsupportedEncoding,
)
from gateway.admission.caller import current_caller
from gateway.http.asgi import HttpMiddleware
from gateway.http.sse import json_bytes
from gateway.telemetry.logs import current_record
from gateway.telemetry.metrics import error_reason

logger = logging.getLogger(__name__)

# Class → (status, type, code). The first match along the class's own order of resolution counts.
STATUS: dict[type[MantaError], tuple[int, str, str | None]] = {
    ContextTooLong: (400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequest: (400, "invalid_request_error", None),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    PayloadTooLarge: (413, "invalid_request_error", "payload_too_large"),
    UnsupportedEncoding: (415, "invalid_request_error", "unsupported_encoding"),
    RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: (429, "rate_limit_error", "overloaded"),
    RequestCancelled: (499, "cancelled", "cancelled"),
    ModelLoading: (503, "service_unavailable", "model_loading"),
    Unavailable: (503, "service_unavailable", "unavailable"),
    BodyTimeout: (408, "invalid_request_error", "request_timeout"),
    DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
}
# Anthropic's names of the same, for the routes below MESSAGES.
MESSAGES = "/v1/messages"
MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
REQUEST_ID_HEADER = "x-manta-request-id"  # our own; Serve itself answers with the client's x-request-id
REASON_HEADER = "x-manta-reason"  # why there is no answer, as logs and figures say it
UNKNOWN_ROUTE = "unknown_route"  # a reason, also of a method that a route has not
ROUTE_TYPES = {403: "not_found_error", 404: "not_found_error", 405: "method_not_allowed"}
UNREAD = frozenset({401, 408, 413, 415})  # answered before the body was read, which is not waited for
INTERNAL = (500, "internal_error", None)
INTERNAL_MESSAGE = "internal error; the server's log has the details under this request's id, {request_id}"


def status_of(error: BaseException) -> tuple[int, str, str | None]:
    """(status, type, code)."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), INTERNAL)


def error_body(error: BaseException, request_id: str) -> dict[str, object]:
    """OpenAI's shape. An error that nobody designed is logged, and tells the client only that it happened."""
    status, kind, code = status_of(error)
    if status == 500:
        logger.error("request %s failed", request_id, exc_info=error)
        return body(INTERNAL_MESSAGE.format(request_id=request_id), kind, None, code)
    param = "model" if isinstance(error, ModelNotFound) else getattr(error, "param", None)
    return body(str(error), kind, param, code)


def retry_after_seconds(error: BaseException) -> int | None:
    """When another try is worth it; None where it never is."""
    retry_after_s = getattr(error, "retry_after_s", None)
    return None if retry_after_s is None else max(1, math.ceil(retry_after_s))


def body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    """`{"error": {…}}`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_messages(document: Mapping[str, Any], status: int, request_id: str) -> dict[str, object]:
    """The same error as Anthropic has it."""
    kind = MESSAGES_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"type": kind, "message": document["error"]["message"]}
    return {"type": "error", "error": error, "request_id": request_id}


def error_response(error: BaseException, request_id: str, path: str = "") -> Response:
    """The whole answer on a route, with Retry-After where another try is worth it."""
    headers = {REQUEST_ID_HEADER: request_id, REASON_HEADER: error_reason(error), **current_caller().headers()}
    seconds = retry_after_seconds(error)
    if seconds is not None:
        headers["retry-after"] = str(seconds)
    status = status_of(error)[0]
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in UNREAD:
        headers["connection"] = "close"
    document = error_body(error, request_id)
    if path.startswith(MESSAGES):
        document = of_messages(document, status, request_id)
        headers["request-id"] = request_id
    return json_response(document, status, headers)


def no_route(status: int, message: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
    """There is nothing at a path, in the shape of the API that it would be of; the log's line says so as well."""
    request_id = f"req-{uuid.uuid4().hex}"
    document = body(message, ROUTE_TYPES.get(status, "invalid_request_error"), None, None)
    of_route = {REQUEST_ID_HEADER: request_id, REASON_HEADER: UNKNOWN_ROUTE, **(headers or {})}
    if record := current_record():
        record.error, record.reason = "UnknownRoute", UNKNOWN_ROUTE
    if path.startswith(MESSAGES):
        document = of_messages(document, status, request_id)
        of_route["request-id"] = request_id
    return json_response(document, status, of_route)


def json_response(
    document: object, status: int = 200, headers: dict[str, str] | None = None, num_bytes: int = 0
) -> Response:
    """JSON in UTF-8, of about so many bytes if it may be large."""
    content = json_bytes(document, num_bytes)
    return Response(content, status_code=status, headers=headers, media_type="application/json")


class ErrorAnswers(HttpMiddleware):
    """Outermost but for Starlette's own: every exception of a request becomes an answer by the one table."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if record := current_record():
                record.fail(error)
            request_id = scope.get("state", {}).get("request_id") or f"req-{uuid.uuid4().hex}"
            if started:
                raise  # the connection is cut: what was sent must not look complete
            with contextlib.suppress(OSError):  # a client that left
                await error_response(error, request_id, scope["path"])(scope, receive, send)
