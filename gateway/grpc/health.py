"""grpc.health.v1 over the models' Health. A mixin of the gRPC door, because Serve finds RPCs by their names there."""
# ruff: noqa: N802  # the RPCs' names

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from cluster.errors import Overloaded, Unauthorized, Unavailable
from gateway.frontend import Frontend
from gateway.grpc.authentication import connection, peer_address
from gateway.grpc.errors import RpcFailed, fail, failing_stream, status_of
from gateway.grpc.watches import Watches

SERVICE = "manta.v1.Manta"
WATCH_INTERVAL_S = 0.5


class HealthRpcs:
    """Check, Watch and List: for everyone, or this machine, as HTTP's /health."""

    frontend: Frontend
    watches: Watches

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING when every model can answer."""
        if not await self._is_admitted(grpc_context):
            return health_pb2.HealthCheckResponse()
        status = await self._serving(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await fail(grpc_context, grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Any
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """grpc.health.v1: the status now and whenever it changes, until the client or the door's timeout ends it."""
        with failing_stream():
            if not await self._is_admitted(grpc_context):
                raise RpcFailed
            try:
                with self.watches.place(connection(grpc_context)) as over:
                    last = None
                    while not over.is_set():
                        status = await self._serving(request.service)
                        if status != last:
                            last = status
                            yield health_pb2.HealthCheckResponse(status=status)
                        with suppress(TimeoutError):
                            await asyncio.wait_for(over.wait(), WATCH_INTERVAL_S)
                raise self.watches.why_over
            except (Overloaded, Unavailable) as error:
                await fail(grpc_context, *status_of(error, ""))
                raise RpcFailed from None

    async def List(
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        grpc_context: Any,
    ) -> health_pb2.HealthListResponse:
        """grpc.health.v1: every service's status."""
        response = health_pb2.HealthListResponse()
        if await self._is_admitted(grpc_context):
            for service in ("", SERVICE):
                response.statuses[service].status = await self._serving(service)
        return response

    async def _is_admitted(self, context: Any) -> bool:
        """Whether it goes on. Else the RPC's status is set."""
        try:
            self.frontend.access.require_local(peer_address(context.peer()))
        except Unauthorized as error:
            await fail(context, *status_of(error, ""))
            return False
        return True

    async def _serving(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        models = await self.frontend.health.models()
        if all(state.phase == "ready" for state in models.values()):
            return int(health_pb2.HealthCheckResponse.SERVING)
        return int(health_pb2.HealthCheckResponse.NOT_SERVING)
