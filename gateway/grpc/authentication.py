"""Stands before every RPC. Knows metadata and peers as gRPC spells them; who may pass is the access policy's to say."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from gateway.admission.access import AccessPolicy, is_loopback
from gateway.admission.api_keys import ApiKey
from gateway.admission.caller import Caller, set_caller
from gateway.admission.limits import Limiter

CLIENT = "x-manta-client"  # set by HAProxy, whatever the client says


def authenticate(access: AccessPolicy, limiter: Limiter, context: Any) -> Caller:
    """To be called first by every RPC but grpc.health.v1's. Raises Unauthorized.

    RPCs that count as requests of a key `enter` and `leave` the caller.
    """
    caller = Caller(identify(access, context), limiter)
    set_caller(caller)
    return caller


def identify(access: AccessPolicy, context: Any) -> ApiKey | None:
    """Whose RPC it is, by its metadata. Raises Unauthorized."""
    sent: dict[str, list[str]] = {"authorization": [], "x-api-key": []}
    for name, value in context.invocation_metadata():
        if name in sent:
            sent[name].append(str(value))
    return access.identify(sent["authorization"], peer_address(context.peer()), sent["x-api-key"])


def connection(context: Any) -> str:
    """The client's, for what is bounded by client: who may pass is another question.

    Behind HAProxy a client may have several, so HAProxy says whose each is. Others on this machine may say so as well,
    and gain what as many connections would give them.
    """
    peer = str(context.peer())
    if is_loopback(peer_address(peer) or ""):
        return next((str(value) for name, value in context.invocation_metadata() if name == CLIENT), peer)
    return peer


def trace_header(context: Any, header: str) -> str:
    """W3C's `traceparent` or `tracestate` of the client; empty for none."""
    return next((str(value) for name, value in context.invocation_metadata() if name == header), "")


def peer_address(peer: str) -> str | None:
    """The IP address in `ipv4:127.0.0.1:50000` or `ipv6:%5B::1%5D:50000`; None for any other kind."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return rest.rpartition(":")[0].strip("[]")
