"""Keeps out of Serve's log what clients of the gRPC door do. Knows loggers and exceptions; no RPC.

Serve (2.60) logs a stream that is refused, or whose client leaves, as a failure of its own, with a traceback and the
status's details. The gateway's log has a line for each, which says who and why.
"""

from __future__ import annotations

import asyncio
import logging

from ray.serve.exceptions import RequestCancelledError

from gateway.grpc.errors import RpcFailed

_CLIENTS_DOING = (RpcFailed, RequestCancelledError, asyncio.CancelledError, GeneratorExit)


def quiet_serve() -> None:
    """In this process, from now on."""
    for name in ("ray.serve", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)  # added once: it is the same function each time


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(getattr(error, "original_exception", error), _CLIENTS_DOING)
