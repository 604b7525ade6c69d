"""An HTTP/2 client that sends gRPC messages frame by frame, as much as flow control lets it, and holds none of them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW = 65_535
PIECE = b"\0" * 16_384


class Sender:
    """One connection whose streams each send one message."""

    def __init__(self, *, stays: bool = False) -> None:
        """`stays`: it acknowledges the settings only once it is told to go, and then stays, as gRPC's C core may."""
        self._stays = stays
        self.was_told_to_go = False
        self.is_closed = False  # by the server
        self.num_bytes = 0  # that were sent of all messages
        self.num_ended = 0  # streams that the server ended
        self.num_pings = 0
        self._initial_window = INITIAL_WINDOW
        self._window = INITIAL_WINDOW  # of the connection
        self._windows: dict[int, int] = {}  # of the streams that are open
        self._left: dict[int, int] = {}
        self._changed = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Streams that the server has not ended."""
        return len(self._left)

    async def send(
        self, address: str, path: str, num_streams: int, message: bytes | int, until: Callable[[], bool] = lambda: True
    ) -> None:
        """Until the server has ended every stream, or has taken every message, and then until something is so.

        A number is that of a message's bytes, all of them 0.
        """
        data, size = (b"", message) if isinstance(message, int) else (message, len(message))
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        reading = asyncio.create_task(self._read(reader, writer))
        try:
            writer.write(PREFACE + _frame(SETTINGS, 0, 0))
            for stream in range(1, 2 * num_streams, 2):
                self._windows[stream], self._left[stream] = self._initial_window, size + 5
                writer.write(_frame(HEADERS, END_HEADERS, stream, _headers(path, address)))
                writer.write(_frame(DATA, 0, stream, struct.pack(">BI", 0, size) + data))
                self._took(stream, 5 + len(data))
            while any(self._left.values()) and not reading.done():
                self._changed.clear()
                if not self._send_what_fits(writer):
                    await asyncio.wait(
                        (asyncio.ensure_future(self._changed.wait()), reading), return_when="FIRST_COMPLETED"
                    )
                with suppress(ConnectionError):
                    await writer.drain()
            while not until():
                await asyncio.sleep(0.05)
        finally:
            reading.cancel()
            writer.close()

    def _send_what_fits(self, writer: asyncio.StreamWriter) -> int:
        sent = 0
        for stream, left in list(self._left.items()):
            size = min(len(PIECE), left, self._window, self._windows[stream])
            if size > 0:
                writer.write(_frame(DATA, 0, stream, PIECE[:size]))
                self._took(stream, size)
                sent += size
        return sent

    def _took(self, stream: int, size: int) -> None:
        self._left[stream] -= size
        self._windows[stream] -= size
        self._window -= size
        self.num_bytes += size

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(9)
                size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
                payload = await reader.readexactly(size)
                if kind == SETTINGS and not flags & ACK:
                    self._apply(payload)
                    if not self._stays:
                        writer.write(_frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self.num_pings += 1
                    writer.write(_frame(PING, ACK, 0, payload))
                elif kind == WINDOW_UPDATE:
                    more = int.from_bytes(payload, "big")
                    if stream == 0:
                        self._window += more
                    elif stream in self._windows:
                        self._windows[stream] += more
                elif kind == GOAWAY:
                    self.was_told_to_go = True
                    if not self._stays:
                        return
                    writer.write(_frame(SETTINGS, ACK, 0))
                elif kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                    self.num_ended += self._left.pop(stream, None) is not None
                self._changed.set()
        self.is_closed = True

    def _apply(self, settings: bytes) -> None:
        for identifier, value in struct.iter_unpack(">HI", settings):
            if identifier == 4:  # SETTINGS_INITIAL_WINDOW_SIZE
                for stream in self._windows:
                    self._windows[stream] += value - self._initial_window
                self._initial_window = value


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _headers(path: str, authority: str) -> bytes:
    fields = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": authority,
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    # Literals without indexing, and lengths of one byte.
    return b"".join(
        bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode() for name, value in fields.items()
    )
