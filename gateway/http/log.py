"""Writes the line of each HTTP request, WebSockets among them. Knows ASGI; what is in a line is the record's."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.telemetry.layer_times import wants_layers
from gateway.admission.caller import ANONYMOUS, current_caller, set_caller
from gateway.http.authentication import READY_PATH
from gateway.http.errors import REQUEST_ID_HEADER
from gateway.telemetry.logs import RequestRecord, open_record
from gateway.telemetry.request_ends import RequestEnds

QUIET_ROUTES = frozenset({"/", "/health", "/metrics"})  # asked for all the time; logged only when they fail
# Asked for every few seconds; its 503 is no failure.
SILENT_ROUTES = frozenset({READY_PATH})


class HttpLog:
    """ASGI middleware, outside of all that answers."""

    def __init__(self, app: ASGIApp, ends: RequestEnds) -> None:
        self._app = app
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        traced = headers.get("traceparent", ""), wants_layers(headers.get("tracestate", ""))
        record = open_record(RequestRecord("http", "", traceparent=traced[0], traces_layers=traced[1]))
        set_caller(ANONYMOUS)

        async def watched(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                record.status = str(message["status"])
                record.request_id = Headers(raw=message["headers"]).get(REQUEST_ID_HEADER, "")
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except BaseException as error:
            if not record.error:
                record.fail(error)
            raise
        finally:
            record.route = getattr(scope.get("route"), "path", "unknown")
            record.key_id = current_caller().id
            is_quiet = record.route in QUIET_ROUTES and record.status in ("", "200")
            self._ends(record, is_quiet=is_quiet or record.route in SILENT_ROUTES)
