"""What clients' headers may tell Ray Serve: nothing but a request id of bounded length in safe characters.

Serve calls `middlewares` in its proxies and in replicas that it connects to HAProxy directly, where the environment has
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gateway.edge.client_headers:middlewares. They stand before all of Serve's own
code, which otherwise lets a client switch off timeouts and the watch for disconnects, takes any request id, and decodes
all headers as UTF-8.
"""

from __future__ import annotations

import re
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.edge.serve_answers import ServeAnswers, answer_malformed_requests

IMPORT_PATH = "gateway.edge.client_headers:middlewares"
REQUEST_ID = b"x-request-id"
SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# Serve's own commands, by their names with - for _: it takes either for some of them.
COMMANDS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
    }
)


class ClientHeaders:
    """ASGI middleware. Serve answers with the request id that it is shown, the client's where that is safe."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name.lower() == REQUEST_ID]
        is_safe = len(given) == 1 and SAFE_REQUEST_ID.fullmatch(given[0]) is not None
        request_id = given[0] if is_safe else uuid.uuid4().hex.encode()
        headers = [(name, value) for name, value in scope["headers"] if _passes(name, value)]

        async def with_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() != REQUEST_ID]
                message = {**message, "headers": [*kept, (REQUEST_ID, request_id)]}
            await send(message)

        await self._app({**scope, "headers": [*headers, (REQUEST_ID, request_id)]}, receive, with_request_id)


def middlewares() -> list[Middleware]:
    """For Serve; the first is the outermost. It asks before it makes its servers, which are changed here, too."""
    from gateway.grpc.server.server import install_in_proxy

    install_in_proxy()
    answer_malformed_requests()
    return [Middleware(ClientHeaders), Middleware(ServeAnswers)]


def _passes(name: bytes, value: bytes) -> bool:
    name = name.lower()
    if name == REQUEST_ID or name.replace(b"_", b"-") in COMMANDS:
        return False
    try:
        name.decode()
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
