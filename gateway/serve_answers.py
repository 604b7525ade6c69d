"""What Ray Serve itself answers, in the shape of our errors. Knows ASGI and Serve's plain texts; knows no route.

Serve has answers of its own before and around the application: 429 when its queue is full, 408 at its timeout, 404
where nothing is deployed, 500. They are plain text, which none of our routes answers with an error.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from gateway.asgi import HttpMiddleware
from gateway.http_errors import body
from gateway.sse import json_bytes

_OWN_PATHS = "/-/"  # Serve's health and routes, which HAProxy and people read
_MEANINGS = {  # status → (type, code)
    404: ("not_found_error", None),
    408: ("timeout_error", "deadline_exceeded"),
    429: ("rate_limit_error", "overloaded"),
    503: ("service_unavailable", "unavailable"),
}


class ServeAnswers(HttpMiddleware):
    """ASGI middleware, before all of Serve's own code."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_OWN_PATHS):
            await self.app(scope, receive, send)
            return
        start: Message | None = None  # of an answer that is Serve's own
        text = b""

        async def reshaped(message: Message) -> None:
            nonlocal start, text
            if message["type"] == "http.response.start" and message["status"] >= 400 and _is_plain(message):
                start = message
            elif start is None:
                await send(message)
            else:
                text += message.get("body", b"")
                if not message.get("more_body", False):
                    content = _shaped(start["status"], text.decode("utf-8", "replace"))
                    headers = MutableHeaders(raw=[(name, value) for name, value in start["headers"]])
                    headers["content-type"], headers["content-length"] = "application/json", str(len(content))
                    await send({**start, "headers": headers.raw})
                    await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, reshaped)


def _is_plain(start: Message) -> bool:
    headers = Headers(raw=[(name, value) for name, value in start.get("headers", ())])
    return headers.get("content-type", "").startswith("text/plain")


def _shaped(status: int, text: str) -> bytes:
    kind, code = _MEANINGS.get(status, ("internal_error", None))
    message = text if status < 500 else "the request could not be answered"  # a stack of Serve's, perhaps
    return json_bytes(body(message, kind, None, code))
