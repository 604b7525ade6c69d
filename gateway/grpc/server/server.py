"""Puts our gRPC server in the place of Serve's: with our options, behind the gate, on loopback where that is meant.

Serve (2.60) makes its servers without interceptors and on every interface, and has one option, the size of a message.
It makes one in each of its proxies, and one in each of our replicas once that is initialized.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from grpc.aio._server import Server
from ray._common.network_utils import get_localhost_ip
from ray.serve._private import grpc_util

from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from cluster.ray_variables import DOORS
from gateway.admission.access import AccessPolicy, is_loopback
from gateway.grpc.server.gate import Gate
from gateway.grpc.server.options import server_options
from gateway.grpc.server.serve_log import quiet_serve
from gateway.telemetry.request_ends import RequestEnds


def install(config: GatewayConfig, access: AccessPolicy | None, ends: RequestEnds | None = None) -> None:
    """From now on Serve's gRPC servers in this process are ours, and its log is silent about what clients do there."""
    quiet_serve()
    grpc_util.gRPCGenericServer = functools.partial(DoorServer, config, access, ends)


def install_in_proxy() -> None:
    """The same where there is no frontend to know the configuration, and nothing was installed yet."""
    document = os.environ.get(DOORS)
    if document is None or isinstance(grpc_util.gRPCGenericServer, functools.partial):
        return
    config = GatewayConfig.model_validate_json(document)
    try:
        access = AccessPolicy(config)
    except ConfigError:
        access = None  # the keys are elsewhere: with the replica, which asks for them again
    install(config, access)


class DoorServer(grpc_util.gRPCGenericServer):  # type: ignore[misc]
    """Serve's server, whose handlers lead to Serve."""

    def __init__(
        self,
        config: GatewayConfig,
        access: AccessPolicy | None,
        ends: RequestEnds | None,
        service_handler_factory: Callable[..., Any],
        *,
        extra_options: Sequence[tuple[str, str]] = (),
    ) -> None:
        # As Serve's class does, with interceptors.
        Server.__init__(
            self,
            thread_pool=None,
            generic_handlers=(),
            interceptors=(Gate(config, access, ends),),
            maximum_concurrent_rpcs=None,
            compression=None,
            options=[*server_options(config), *extra_options],
        )
        self.generic_rpc_handlers: list[Any] = []
        self.service_handler_factory = service_handler_factory
        self._passthrough_service_names: set[str] = set()
        self._host = get_localhost_ip() if is_loopback(config.host) else None

    def add_insecure_port(self, address: str) -> int:
        """On loopback where the doors are: HAProxy, which is on this machine, finds a replica there."""
        if self._host is not None:
            host = f"[{self._host}]" if ":" in self._host else self._host
            address = f"{host}:{address.rpartition(':')[2]}"
        return int(super().add_insecure_port(address))
