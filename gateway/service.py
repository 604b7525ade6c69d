"""The gateway as a Serve deployment: both doors in one class. Composes; every decision is in the modules it imports.

Serve builds the HTTP application inside the replica (`__serve_build_asgi_app__`), so that what is pickled is only
the configuration and the model cards. gRPC calls arrive as the methods of GrpcDoor, by the name of the RPC.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from cluster.config import GatewayConfig
from cluster.messages import ModelCard
from cluster.planning.scaling_policy import LOAD, replica_options
from cluster.telemetry.metrics import ProcessFigures
from cluster.telemetry.traces import Traces
from cluster.termination import Termination
from gateway.active_cluster import ActiveCluster
from gateway.coordinators.health import Health, probe_serve
from gateway.coordinators.serve_client import ServeCoordinatorClient
from gateway.frontend import Frontend
from gateway.grpc.door import GrpcDoor
from gateway.grpc.health import WATCH_INTERVAL_S
from gateway.grpc.server.server import install
from gateway.http.app import build_app
from gateway.telemetry.kernel_watch import KernelWatch
from gateway.telemetry.logs import configure_logs
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.metrics_page import MetricsPage, ServeProcesses
from gateway.text.tokenizer_files import load_tokenizer

DEPLOYMENT = "gateway"
# As many as HAProxy has connections. It is we who refuse, by bounds of our own: to Serve a client that is slow with its
# request counts as much as one that is being answered, and /health as well.
MAX_CONNECTIONS = 4096
HEALTH_CHECK_PERIOD_S = 1.0  # a replica has to fail three checks until Serve ends it

SERVICER_FUNCTIONS = [
    "gateway.grpc.cancellation.add_MantaServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]


class GatewayReplica(GrpcDoor):
    """One gateway process."""

    def __init__(self, config: GatewayConfig, cards: tuple[ModelCard, ...]) -> None:
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._made_of = config, cards
        configure_logs(config.log_format)
        metrics = GatewayMetrics()
        coordinators = {card.application: ServeCoordinatorClient(card) for card in cards}

        async def missing_experts(card: ModelCard) -> tuple[str, ...]:
            return (await coordinators[card.application].stats()).missing_experts

        kernels = KernelWatch(ServeProcesses("kernels"))
        frontend = Frontend(
            config,
            cards,
            tokenizers={
                card.application: load_tokenizer(Path(card.directory), card.layout, card.vocab_size, card.parsers)
                for card in cards
            },
            coordinators=coordinators,
            health=Health(cards, probe_serve, missing_experts, kernels.look),
            metrics=metrics,
            traces=Traces("manta-gateway", config.otlp_endpoint),
            metrics_page=MetricsPage(metrics, cards, ServeProcesses("metrics"), self._replica),
            kernels=kernels,
            active_cluster=ActiveCluster.of_environment(),
        )
        install(config, frontend.access, frontend.ends)
        super().__init__(frontend)
        grace_s = serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s
        self._termination = Termination(grace_s, self.watches.end, serve_sees_it_s=4 * HEALTH_CHECK_PERIOD_S)
        self._ending = asyncio.get_running_loop().create_task(self._end_watches_when_ended())

    async def check_health(self) -> None:
        """Called by Serve; raises Unavailable after SIGTERM, so that Serve lets the streams end and starts another.

        On the loop that requests are answered on: Serve calls what is not asynchronous in a thread.
        """
        self.frontend.metrics.loop.start()
        self._termination.check()

    async def _end_watches_when_ended(self) -> None:
        """Once Serve ends this replica, which waits for all that it answers: nothing waits for those who only watch."""
        while not _is_ended_by_serve():
            await asyncio.sleep(WATCH_INTERVAL_S)
        self.watches.end()

    async def end_watches(self) -> None:
        """Called by `manta k8s drain` where the whole cluster is taken away, and Serve ends no replica."""
        self.watches.end()

    def made_of(self) -> tuple[GatewayConfig, tuple[ModelCard, ...]]:
        """Configuration and models, where `manta apply` begins."""
        return self._made_of

    async def metrics(self) -> ProcessFigures:
        """What this process counted, for the /metrics of every replica."""
        return self.frontend.metrics.figures(self._replica)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy decides by: requests that are being answered. To Serve, /health is one, too."""
        return {LOAD: float(self.frontend.num_ongoing)}

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self.frontend)


def _is_ended_by_serve() -> bool:
    """Serve tells no code of ours, only its own object in this process."""
    return any(actor._replica_impl._shutting_down for actor in ray._private.worker.global_worker.actors.values())


Gateway: Any = serve.deployment(name=DEPLOYMENT)(serve.ingress()(GatewayReplica))


def gateway_application(config: GatewayConfig, cards: tuple[ModelCard, ...], code_version: str | None = None) -> Any:
    """What `serve.run(…, name="gateway", route_prefix="/")` takes. Serve restarts no replica of the same version."""
    deployment = Gateway if code_version is None else Gateway.options(version=code_version, _internal=True)
    return deployment.options(
        **replica_options(config.replicas),
        max_ongoing_requests=config.max_ongoing_requests + MAX_CONNECTIONS,
        max_queued_requests=config.max_ongoing_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": config.num_cpus}
        | ({"label_selector": config.label_selector} if config.label_selector else {}),
        graceful_shutdown_timeout_s=config.request_timeout_s + 10.0,  # the longest stream ends by itself before
        max_surge_percent=100,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    ).bind(config, cards)


def http_options(config: GatewayConfig) -> HTTPOptions:
    """For `serve.start`. Serve's own timeout comes after ours, and covers what we cannot see."""
    return HTTPOptions(host=config.host, port=config.http_port, request_timeout_s=config.request_timeout_s + 5)


def grpc_options(config: GatewayConfig) -> gRPCOptions:
    """For `serve.start`."""
    return gRPCOptions(
        port=config.grpc_port,
        grpc_servicer_functions=SERVICER_FUNCTIONS,
        request_timeout_s=config.request_timeout_s + 5,
        enable_reflection=config.api_keys_file is None,  # Serve answers it itself, before any key is asked for
    )
