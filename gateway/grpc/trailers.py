"""Bounds what goes into HTTP/2 headers and trailers, in bytes as they are encoded. Knows gRPC's contexts; no status.

HAProxy holds a block of headers in a buffer of 16 KB, and closes the connection to the replica where one is larger,
with every stream on it. A status's details are percent-encoded on their way: one character may become twelve bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

MAX_DETAILS_BYTES = 2048
MAX_METADATA_BYTES = 4096  # names, values and what HTTP/2 counts for each entry
ENTRY_BYTES = 32  # RFC 9113, 6.5.2
SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What Serve reads as commands of its own, and repeats in its errors. We have one application and no such models.
COMMANDS = frozenset({"application", "multiplexed_model_id", "session_id"})

Metadata = Iterable[tuple[str, Any]]


def fitting_details(details: str) -> str:
    """As much of a status's details as has room, in whole characters."""
    size = 0
    for at, character in enumerate(details):
        # Printable ASCII stays as it is, but for the percent sign.
        size += sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in character.encode("utf-8", "replace"))
        if size > MAX_DETAILS_BYTES:
            return details[:at]
    return details


def fitting_metadata(metadata: Metadata) -> list[tuple[str, Any]]:
    """The entries that have room, from the first on."""
    kept, size = [], 0
    for name, value in metadata:
        # What is binary travels in base64.
        size += len(name) + ENTRY_BYTES + (len(value) * 4 // 3 + 4 if isinstance(value, bytes) else len(value))
        if size > MAX_METADATA_BYTES:
            break
        kept.append((name, value))
    return kept


def passed_metadata(metadata: Metadata) -> tuple[tuple[str, Any], ...]:
    """The client's metadata without what Serve would obey or repeat; a request id only where it is short and plain."""
    return tuple(
        (name, value)
        for name, value in metadata
        if name not in COMMANDS and (name != "request_id" or SAFE_REQUEST_ID.fullmatch(str(value)))
    )


class FittingContext:
    """A servicer's context for Serve: its client's metadata is `passed_metadata`, and what it sends back fits.

    To be made before an RPC waits for anything.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer: str = context.peer()
        self._metadata = passed_metadata(context.invocation_metadata() or ())

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._metadata

    def peer(self) -> str:
        """As it was: grpc.aio (1.85) dies where it is asked after the client has gone, and Serve's proxy asks then."""
        return self._peer

    def set_details(self, details: str) -> None:
        self._context.set_details(fitting_details(details))

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, Any]]) -> None:
        self._context.set_trailing_metadata(tuple(fitting_metadata(metadata)))

    async def abort(self, code: Any, details: str = "", trailing_metadata: Sequence[tuple[str, Any]] = ()) -> None:
        await self._context.abort(code, fitting_details(details), tuple(fitting_metadata(trailing_metadata)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
