"""Stands before every RPC. Knows metadata and peers as gRPC spells them; who may pass is the Guard's decision."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from gateway.api_keys import ApiKey
from gateway.caller import Caller, set_caller
from gateway.guard import Guard
from gateway.limits import Limiter


def pass_guard(guard: Guard, limiter: Limiter, context: Any) -> Caller:
    """To be called first by every RPC but grpc.health.v1's. Raises Unauthorized.

    RPCs that count as requests of a key `enter` and `leave` the caller.
    """
    caller = Caller(identify(guard, context), limiter)
    set_caller(caller)
    return caller


def identify(guard: Guard, context: Any) -> ApiKey | None:
    """Whose RPC it is, by its metadata. Raises Unauthorized."""
    authorization = [str(value) for name, value in context.invocation_metadata() if name == "authorization"]
    return guard.identify(authorization, peer_address(context.peer()))


def traceparent(context: Any) -> str:
    """The client's span, as W3C writes it; empty for none."""
    return next((str(value) for name, value in context.invocation_metadata() if name == "traceparent"), "")


def peer_address(peer: str) -> str | None:
    """The IP address in `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`; None for any other kind."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return rest.rpartition(":")[0].strip("[]")
