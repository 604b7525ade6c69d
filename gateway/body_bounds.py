"""Bounds what clients send: how long a body may take, and how much all of them may occupy. Knows bytes, no JSON.

Stands behind the guard, so that nobody without a key gets a byte of theirs held, and before every route.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BodyTimeout, Overloaded
from gateway.asgi import HttpMiddleware


class BodyBounds(HttpMiddleware):
    """ASGI middleware. Reading a body raises BodyTimeout, or Overloaded when others' fill the memory set aside."""

    def __init__(self, app: ASGIApp, timeout_s: float, max_bytes_of_all: int) -> None:
        super().__init__(app)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes_of_all
        self._num_bytes = 0  # of bodies that no answer has been begun for

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        is_complete = False
        held = 0

        def release() -> None:
            nonlocal held
            self._num_bytes -= held
            held = 0

        async def bounded_receive() -> Message:
            nonlocal is_complete, held
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(f"the body was not complete within {self._timeout_s:g} s") from None
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            size = len(message.get("body", b""))
            if self._num_bytes + size > self._max_bytes:
                raise Overloaded("too many large requests are being received; try again later")
            self._num_bytes += size
            held += size
            return message

        async def released_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                release()
            await send(message)

        try:
            await self.app(scope, bounded_receive, released_send)
        finally:
            release()
