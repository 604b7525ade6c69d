"""Bounds what clients send: how long a body may take, and how much all of them may occupy. Knows bytes, no JSON.

Stands behind authentication, so that nobody without a key gets a byte of theirs held, and before every route.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BodyTimeout
from gateway.admission.caller import current_caller
from gateway.admission.held_bytes import Held, HeldBytes
from gateway.http.asgi import HttpMiddleware


class BoundedReceiving(HttpMiddleware):
    """ASGI middleware. Reading a body raises BodyTimeout, or Overloaded when others' fill the memory set aside."""

    def __init__(self, app: ASGIApp, timeout_s: float, max_bytes_of_all: int) -> None:
        super().__init__(app)
        self._timeout_s = timeout_s
        self._bytes = HeldBytes(max_bytes_of_all)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._bytes.of(current_caller().id) as held:
            await self.app(scope, self._bounded(receive, held), _released(send, held))

    def _bounded(self, receive: Receive, held: Held) -> Receive:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        is_complete = False

        async def bounded_receive() -> Message:
            nonlocal is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(f"the body was not complete within {self._timeout_s:g} s") from None
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            held.add(len(message.get("body", b"")))
            return message

        return bounded_receive


def _released(send: Send, held: Held) -> Send:
    async def released_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            held.release()
        await send(message)

    return released_send
