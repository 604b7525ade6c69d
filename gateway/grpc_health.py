"""grpc.health.v1 over the models' Health. A mixin of the gRPC door, because Serve finds RPCs by their names there."""
# ruff: noqa: N802  # the RPCs' names

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from gateway.frontend import Frontend
from gateway.grpc_errors import fail

SERVICE = "manta.v1.Manta"
WATCH_INTERVAL_S = 0.5


class HealthRpcs:
    """Check, Watch and List."""

    frontend: Frontend

    async def Check(self, request: health_pb2.HealthCheckRequest, grpc_context: Any) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING when every model can answer."""
        status = await self._serving(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await fail(grpc_context, grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        grpc_context: Any,  # noqa: ARG002
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """grpc.health.v1: the status now and whenever it changes, until the client or the door's timeout ends it."""
        last = None
        while True:
            status = await self._serving(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def List(
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        grpc_context: Any,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """grpc.health.v1: every service's status."""
        response = health_pb2.HealthListResponse()
        for service in ("", SERVICE):
            response.statuses[service].status = await self._serving(service)
        return response

    async def _serving(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        models = await self.frontend.health.models()
        if all(state.phase == "ready" for state in models.values()):
            return int(health_pb2.HealthCheckResponse.SERVING)
        return int(health_pb2.HealthCheckResponse.NOT_SERVING)
