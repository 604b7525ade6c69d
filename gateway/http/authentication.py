"""Stands before every HTTP route. Knows paths and headers; who may pass is the access policy's to say.

What is not on the short list of public paths needs a key, however its path is spelled: a path that only resembles a
public one is not on the list.
"""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import InvalidRequest
from gateway.admission.access import AccessPolicy
from gateway.admission.caller import ANONYMOUS, Caller, set_caller
from gateway.admission.limits import Limiter
from gateway.http.errors import error_response, no_route
from gateway.telemetry.logs import current_record

READY_PATH = "/-/ready"  # a path like those that Serve and HAProxy have for themselves
PUBLIC_PATHS = frozenset({"/", "/health", READY_PATH})  # GET and HEAD; the page at / is static
FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # not counted as requests of a key
METRICS_PATH = "/metrics"


class Authentication:
    """ASGI middleware. Raises Unauthorized, RateLimited, and InvalidRequest for a Host or a page that is not ours."""

    def __init__(self, app: ASGIApp, access: AccessPolicy, limiter: Limiter) -> None:
        self._app = app
        self._access = access
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there is no such route
            await no_route(403, "there are no WebSockets here", scope["path"])(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = self._caller(scope)
        set_caller(caller)

        async def with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(caller.headers())
            await send(message)

        try:
            if scope["method"] not in FREE_METHODS:
                caller.enter()
            await self._app(scope, receive, with_limits)
        finally:
            caller.leave()

    def _caller(self, scope: Scope) -> Caller:
        headers = Headers(scope=scope)
        peer = scope["client"][0] if scope.get("client") else None
        authorization = headers.getlist("authorization")
        if scope["path"] in PUBLIC_PATHS and scope["method"] in ("GET", "HEAD"):
            self._access.require_local(peer)
            return ANONYMOUS
        if scope["path"] == METRICS_PATH:
            self._access.require_metrics_token(authorization, peer)
            caller = ANONYMOUS
        else:
            caller = Caller(self._access.identify(authorization, peer, headers.getlist("x-api-key")), self._limiter)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._access.knows_host(hosts[0]):
            raise InvalidRequest("Host: not a name of this server; gateway.allowed_hosts lists them", param="Host")
        asks = headers.get("origin"), headers.get("sec-fetch-site")
        if scope["method"] not in FREE_METHODS and not self._access.knows_page(*asks, hosts[0]):
            raise InvalidRequest(
                "Origin: a server without API keys answers no page of another site; gateway.cors_origins lists those "
                "that may ask",
                param="Origin",
            )
        return caller


class CrossOrigin(CORSMiddleware):
    """Outside of all that answers, so that pages may read errors. What it refuses is an error like any other."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        why = bytes(response.body).decode()
        error = InvalidRequest(f"{why}; gateway.cors_origins lists the pages that may ask", param="Origin")
        if record := current_record():
            record.fail(error)
        refusal = error_response(error, f"req-{uuid.uuid4().hex}")
        refusal.headers.update({k: v for k, v in response.headers.items() if not k.startswith("content-")})
        return refusal
