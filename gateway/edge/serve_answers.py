"""What Ray Serve itself answers, in the shape of our errors. Knows ASGI and Serve's plain texts; knows no route.

Serve has answers of its own before and around the application: 429 when its queue is full, 408 at its timeout, 404
where nothing is deployed, 500. They are plain text, which none of our routes answers with an error. uvicorn, below it,
says 500 where there is no answer at all, and 400 to what is no HTTP request, before any of Serve's code. Below
/v1/messages errors are Anthropic's, as ours are there.

Every path is the gateway's. So a path that Serve does not find is one that will be there, or was: a 503.
"""

from __future__ import annotations

from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import NO_GATEWAY
from gateway.http.asgi import HttpMiddleware
from gateway.http.errors import MESSAGES, REASON_HEADER, body, of_messages
from gateway.http.sse import json_bytes

FAILED = "the request could not be answered"  # in the place of a stack of Serve's
_OWN_PATHS = "/-/"  # Serve's health and routes, which HAProxy and people read
_MEANINGS = {  # status → (type, code, reason)
    400: ("invalid_request_error", None, "bad_request"),
    408: ("timeout_error", "deadline_exceeded", "deadline"),
    429: ("rate_limit_error", "overloaded", "shed_gateway"),
    503: ("service_unavailable", "unavailable", "unavailable"),
}
_INTERNAL = ("internal_error", None, "internal")


class ServeAnswers(HttpMiddleware):
    """ASGI middleware, before all of Serve's own code."""

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_OWN_PATHS):
            await self.app(scope, receive, send)
            return
        start: Message | None = None  # of an answer that is Serve's own
        text = b""
        is_answered = False

        async def reshaped(message: Message) -> None:
            nonlocal start, text, is_answered
            is_answered = True
            if message["type"] == "http.response.start" and message["status"] >= 400 and _is_plain(message):
                start = message
            elif start is None:
                await send(message)
            else:
                text += message.get("body", b"")
                if not message.get("more_body", False):
                    headers = MutableHeaders(raw=[(name, value) for name, value in start["headers"]])
                    status, told = start["status"], text.decode("utf-8", "replace")
                    if status == 404:
                        status, told, headers["retry-after"] = 503, NO_GATEWAY, "1"
                    elif status >= 500:
                        told = FAILED
                    document = _shaped(status, told)
                    if scope["path"].startswith(MESSAGES):
                        headers["request-id"] = Headers(scope=scope).get("x-request-id", "")
                        document = of_messages(document, status, headers["request-id"])
                    content = json_bytes(document)
                    headers["content-type"], headers["content-length"] = "application/json", str(len(content))
                    headers[REASON_HEADER] = _meaning(status)[2]
                    await send({**start, "status": status, "headers": headers.raw})
                    await send({"type": "http.response.body", "body": content})

        try:
            await self.app(scope, receive, reshaped)
        finally:
            if not is_answered:
                for message in convert_object_to_asgi_messages("", 500):
                    await reshaped(message)


def answer_malformed_requests() -> None:
    """From now on uvicorn's answers to them, in this process, are in the shape of ours."""
    HttpToolsProtocol.send_400_response = _send_400  # type: ignore[assignment, method-assign]
    H11Protocol.send_400_response = _send_400  # type: ignore[assignment, method-assign]


def _send_400(protocol: HttpToolsProtocol | H11Protocol, text: str) -> None:
    content = json_bytes(_shaped(400, text))
    head = (
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(content)}\r\n{REASON_HEADER}: {_meaning(400)[2]}\r\n\r\n"
    )
    protocol.transport.write(head.encode() + content)
    protocol.transport.close()


def _is_plain(start: Message) -> bool:
    headers = Headers(raw=[(name, value) for name, value in start.get("headers", ())])
    return headers.get("content-type", "").startswith("text/plain")


def _meaning(status: int) -> tuple[str, str | None, str]:
    return _MEANINGS.get(status, _INTERNAL)


def _shaped(status: int, message: str) -> dict[str, object]:
    kind, code, _ = _meaning(status)
    return body(message, kind, None, code)
