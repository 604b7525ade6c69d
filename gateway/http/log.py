"""Writes the log's line for each HTTP request. Knows ASGI; what is in a line is the record's."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from gateway.admission.caller import ANONYMOUS, current_caller, set_caller
from gateway.http.asgi import HttpMiddleware
from gateway.http.errors import REQUEST_ID_HEADER
from gateway.telemetry.logs import RequestRecord, open_record
from gateway.telemetry.metrics import error_name

QUIET_ROUTES = frozenset({"/", "/health", "/metrics"})  # asked for all the time; logged only when they fail


class HttpLog(HttpMiddleware):
    """ASGI middleware, outside of all that answers."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        traceparent = Headers(scope=scope).get("traceparent", "")
        record = open_record(RequestRecord("http", "", traceparent=traceparent))
        set_caller(ANONYMOUS)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = str(message["status"])
                record.request_id = Headers(raw=message["headers"]).get(REQUEST_ID_HEADER, "")
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except BaseException as error:
            record.error = record.error or error_name(error)
            raise
        finally:
            record.route = getattr(scope.get("route"), "path", "unknown")
            record.key_id = current_caller().id
            if record.route not in QUIET_ROUTES or record.status not in ("", "200"):
                record.write()
