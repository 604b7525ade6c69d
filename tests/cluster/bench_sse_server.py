"""A scripted server of OpenAI's completions: one delay before the first token, one before each later one.

It may answer the first request, which warms up, and then none before so many have come together.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SseServer:
    """What it does, and what it was asked. `faults` names the requests that go wrong, by number; the first is 0."""

    first_s: float
    later_s: float
    faults: dict[int, str] = field(default_factory=dict)  # refused, cut, error, short
    together: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    _all_have_come: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/models"):
            await self._whole(writer, 200, {"data": [{"id": "scripted"}]})
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(body)
        if len(self.bodies) > self.together:
            self._all_have_come.set()
        if len(self.bodies) > 1 or not self.together:
            try:
                async with asyncio.timeout(20):
                    await self._all_have_come.wait()
            except TimeoutError:
                fault = "refused"
                self._all_have_come.set()
        if fault == "refused":
            await self._whole(writer, 503, {"error": {"message": "scripted refusal"}})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        count = body["max_tokens"] - (fault == "short")
        for i in range(count):
            await asyncio.sleep(self.later_s if i else self.first_s)
            if i == 2 and fault == "cut":
                writer.close()
                return
            if i == 2 and fault == "error":
                self._event(writer, {"error": {"message": "scripted"}})
                break
            choice = {"index": 0, "text": "" if i == 1 else "x", "token_ids": [7], "finish_reason": None}
            self._event(writer, {"choices": [choice | ({"finish_reason": "length"} if i == count - 1 else {})]})
            await writer.drain()
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self._event(writer, {"choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    @staticmethod
    def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        writer.write(f"data: {json.dumps(event)}\n\n".encode())

    @staticmethod
    async def _whole(writer: asyncio.StreamWriter, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        writer.close()


@contextmanager
def serving(server: SseServer) -> Iterator[SseServer]:
    """The server on a thread and a port of its own."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.handle, "127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
