"""Watches of health over gRPC at two gateways, one of which Serve ends: it waits for nobody who only watches."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.commands.served import made_of
from cluster.deploy.app import gateway_target
from tests.conftest import Server
from tests.processes import processes
from tests.waiting import wait_for

GATEWAY = "ServeReplica:gateway:gateway"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
START_S = 120
MAX_WATCHES = 32
ENDED_S = 10.0  # ten times the second that Serve and the gateway take to look
GONE_S = 60.0  # ten times what Serve takes to end one; a stream may take ten minutes


def test_a_gateway_that_serve_ends_ends_its_watches_and_the_other_one_does_not(server: Server, ray_cluster) -> None:
    """A client that only watched kept it for as long as a stream may take."""
    ends: list[Future[grpc.StatusCode]] = []
    watched: dict[str, int] = {}

    def are_watched() -> bool:
        """One watch more each time: HAProxy sends them to one gateway after the other."""
        assert len(ends) < MAX_WATCHES
        ends.append(threads.submit(end_of_watch, connections.enter_context(health_watch(server))))
        watched.clear()
        watched.update(gateways_watched(server))
        return len(watched) == 2 and all(watched.values())

    def ended() -> list[grpc.StatusCode]:
        return [end.result() for end in ends if end.done()]

    with ThreadPoolExecutor(MAX_WATCHES) as threads, ExitStack() as connections:
        connections.callback(deploy_gateways, 1)  # whatever happens here
        deploy_gateways(2)
        wait_for(lambda: len(gateways_watched(server)) == 2, START_S, "HAProxy to ask two gateways")
        wait_for(are_watched, START_S, "watches at both")
        assert ended() == []
        deploy_gateways(1)
        told_at = time.monotonic()
        wait_for(ended, ENDED_S, "the watches to end of the gateway that goes")
        wait_for(lambda: len(processes(server, GATEWAY)) == 1, GONE_S, "it to go")
        print(f"it was gone after {time.monotonic() - told_at:.1f} s")
        wait_for(lambda: len(gateways_watched(server)) == 1, GONE_S, "HAProxy to ask the other one alone")
        [stays] = gateways_watched(server)
        goes = next(name for name in watched if name != stays)
        assert set(ended()) == {grpc.StatusCode.UNAVAILABLE}
        # HAProxy, which starts anew when a gateway comes, does not tell of watches that it had before.
        assert watched[goes] <= len(ended()) <= len(ends) - watched[stays]


def deploy_gateways(number: int) -> None:
    """As `manta apply` does with a configuration that says so."""
    from ray import serve

    config, cards = made_of(START_S)
    target = gateway_target(config.model_copy(update={"num_replicas": number}), cards)
    serve.run_many([target], wait_for_applications_running=False)


def gateways_watched(server: Server) -> dict[str, int]:
    """How many RPCs each gateway has that HAProxy asks, by its name there."""
    [raylet] = processes(server, "raylet/raylet")
    port = raylet.environ()["RAY_SERVE_HAPROXY_STATS_PORT"]
    page = httpx.get(f"http://127.0.0.1:{port}/stats;csv").text
    rows = [row for row in csv.DictReader(page.lstrip("# ").splitlines()) if row["pxname"] == "grpc-gateway"]
    return {row["svname"]: int(row["scur"]) for row in rows if row["svname"].startswith("SERVE_REPLICA")}


@contextmanager
def health_watch(server: Server) -> Iterator[Any]:
    """On a connection of its own, once it is told of a state."""
    with grpc.insecure_channel(server.grpc_address, OWN_CONNECTION) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=2 * START_S, wait_for_ready=True
        )
        next(watch)
        yield watch


def end_of_watch(watch: Any) -> grpc.StatusCode:
    try:
        list(watch)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
