"""`manta k8s drain` on a real cluster of several nodes: work goes elsewhere first, and streams end by themselves."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import ray
from ray import serve

from cluster.commands.cluster_connection import JoinedCluster
from cluster.commands.k8s import command, drain
from cluster.commands.k8s.drain import Nodes, Replica, streams_of_haproxy
from cluster.errors import SetupError, Unavailable
from gateway.grpc.watches import Watches
from gateway.service import GatewayReplica
from tests.programs import said_by

TIMEOUT_S = 240


def test_a_stream_ends_by_itself_and_the_next_one_is_elsewhere(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_SERVE_THROUGHPUT_OPTIMIZED"}
    environment |= {"RAY_TMPDIR": "/tmp/manta-drain", "RAY_ADDRESS": ""}
    said = said_by("cluster.drain_streams", tmp_path, environment=environment, timeout_s=TIMEOUT_S)
    seen = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))  # Ray talks, too
    assert seen["still_waiting"], "the pod is kept while its stream goes on, though the replacement is up"
    assert seen["drained"] == "True"
    assert set(seen["nodes"]) == {seen["nodes"][0]}
    assert seen["second"] != seen["nodes"][0]
    drained, said = seen["beside_silence"]
    assert drained == "False", "time is over"
    assert said.startswith("Serve's controller does not answer"), "and once, where it was asked for ever"
    assert said.count("\n") == 0
    assert seen["waiting"] == [None] * 8, "for a pod that takes over; for a stream; for gateways to go first"
    assert seen["taken_away"] == [["True", ""]] * 3, "the gateway's, too, though a client that watched it never left"


HEAD, GATEWAY, OTHER_GATEWAY, EXPERTS = "head", "node-g1", "node-g2", "node-e"
HEADS = frozenset((HEAD,))
WORKERS = frozenset((GATEWAY, OTHER_GATEWAY, EXPERTS))
FOUND = [Replica("gateway", GATEWAY, "g1"), Replica("gateway", OTHER_GATEWAY, "g2"), Replica("expert-0", EXPERTS, "e")]


def test_a_cluster_is_taken_away_where_nothing_that_lives_stays() -> None:
    """KubeRay's autoscaler replaces pods that a drained machine had, though every one of them goes."""
    assert Nodes(HEADS, WORKERS, WORKERS | HEADS).all_go
    assert not Nodes(HEADS, WORKERS, WORKERS).all_go, "replacements may come"
    assert not Nodes(HEADS, WORKERS, frozenset((HEAD, GATEWAY))).all_go
    assert not Nodes(HEADS, WORKERS | {"new"}, WORKERS | HEADS).all_go, "one has joined meanwhile"
    assert Nodes(HEADS, frozenset((EXPERTS,)), WORKERS | HEADS).all_go, "those that are gone count for nothing"
    assert not Nodes(frozenset(), WORKERS, WORKERS | HEADS).all_go, "the next head is not up yet"
    assert not Nodes(HEADS | {"next"}, WORKERS, WORKERS | HEADS).all_go, "the next head is up"


def is_needed(
    monkeypatch: pytest.MonkeyPatch, node: str, nodes: Nodes, *, streaming: Iterable[str] = (), told_s: float = -1.0
) -> bool:
    """Of a node, where these gateways have requests; the clients were told to go elsewhere `told_s` from now."""
    monkeypatch.setattr(drain, "living_nodes", lambda: nodes)
    monkeypatch.setattr(drain, "replicas", lambda: FOUND)
    monkeypatch.setattr(drain, "have_requests", lambda gateways: any(one.actor in streaming for one in gateways))
    monkeypatch.setattr(drain, "end_watches", lambda: None)
    monkeypatch.setattr(drain, "_tell_ray", lambda node_id: None)
    monkeypatch.setattr(drain, "_tell_that_the_head_goes", lambda node_id: None)
    cluster = JoinedCluster("127.0.0.1:6379", Path())
    return drain._is_needed(cluster, node, time.monotonic() + told_s)


def test_what_is_taken_away_goes_gateways_first_and_the_head_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pod waited for replacements that could start nowhere, and the head stayed for twelve minutes."""
    needed = partial(is_needed, monkeypatch)
    all_go = Nodes(HEADS, WORKERS, WORKERS | HEADS)
    assert all(needed(node, all_go, streaming=["g2"]) for node in (GATEWAY, OTHER_GATEWAY, EXPERTS, HEAD))
    assert not needed(GATEWAY, all_go)
    assert needed(GATEWAY, all_go, told_s=5.0), "clients may be sent there still"
    assert needed(GATEWAY, Nodes(HEADS, WORKERS, WORKERS)), "replacements may come"
    assert needed(EXPERTS, all_go), "a gateway that is up may be asked"
    no_gateways = frozenset((EXPERTS,))
    assert not needed(EXPERTS, Nodes(HEADS, no_gateways, no_gateways | HEADS))
    assert needed(HEAD, Nodes(HEADS, no_gateways, no_gateways | HEADS))
    assert not needed(HEAD, Nodes(HEADS, frozenset(), HEADS))
    assert needed(HEAD, Nodes(HEADS, frozenset(), HEADS), told_s=5.0), "others may not have told yet"


def test_watches_end_where_the_cluster_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve, which ends no gateway there, counts them as requests: the pods stayed as long as anybody watched."""
    watches = Watches()

    def broadcast(method: str) -> mock.Mock:
        asyncio.run(getattr(GatewayReplica, method)(SimpleNamespace(watches=watches)))
        return mock.Mock()

    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: mock.Mock(broadcast=broadcast, is_initialized=True))
    with watches.place("a client") as over:
        drain.end_watches()
        assert over.is_set()
    with pytest.raises(Unavailable, match="watch again"), watches.place("a client"):
        pass


def test_a_gateway_that_does_not_answer_has_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    gateways = [Replica("gateway", f"node-{name}", name) for name in ("idle", "silent", "gone")]
    answers: dict[str, object] = {"idle": 0, "silent": None}

    def get_actor(name: str, _namespace: str) -> mock.Mock:
        if name not in answers:
            raise ValueError(name)
        return mock.Mock(**{"get_num_ongoing_requests.remote.return_value": name})

    def wait(asked: list[str], **_: object) -> tuple[list[str], list[str]]:
        return [one for one in asked if answers[one] is not None], [one for one in asked if answers[one] is None]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", answers.__getitem__)
    assert drain.have_requests(gateways)
    answers["silent"] = 0
    assert not drain.have_requests(gateways)
    answers["idle"] = 1
    assert drain.have_requests(gateways)
    assert not drain.have_requests(gateways[2:])


def test_a_node_without_replicas_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_needed(monkeypatch, "node-x", Nodes(HEADS, WORKERS | {"node-x"}, frozenset(("node-x",))), told_s=5.0)


@pytest.fixture
def silent_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a drain beside it has said. Replicas of Serve run here for two looks, as far as processes tell."""

    def watch_cluster(*_: object) -> Iterator[bool]:
        raise Unavailable("the Ray cluster at auto did not answer within 10 s: its GCS stands still")
        yield True

    looks = iter([True, True, False])
    monkeypatch.setattr(drain, "watch_cluster", watch_cluster)
    monkeypatch.setattr(drain, "serve_runs_here", lambda: next(looks))
    monkeypatch.setattr(drain, "AGAIN_S", 0.01)
    return []


def test_where_ray_is_silent_a_pod_stays_while_serve_runs_in_it(silent_ray: list[str]) -> None:
    """Ray's native code ended the hook where the GCS went meanwhile, and Kubernetes cut what the pod streamed."""
    assert drain.run(60, stats_url="http://127.0.0.1:1", say=silent_ray.append)
    [said] = silent_ray
    assert "its GCS stands still. Meanwhile nothing is started elsewhere; this pod stays" in said


def test_a_look_that_fails_ends_no_hook(silent_ray: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes ends the pod of a hook that failed at once, and what it streams."""
    monkeypatch.setattr(drain, "watch_cluster", mock.Mock(side_effect=RuntimeError("no event loop")))
    assert drain.run(60, stats_url="http://127.0.0.1:1", say=silent_ray.append)
    [said] = silent_ray
    assert "RuntimeError('no event loop'). Meanwhile nothing is started elsewhere; this pod stays" in said
    monkeypatch.setattr(drain, "watch_cluster", mock.Mock(side_effect=SetupError("no such address")))
    with pytest.raises(SetupError):
        drain.run(60, stats_url="http://127.0.0.1:1", say=silent_ray.append)


def test_where_ray_is_silent_time_ends_all_the_same(silent_ray: list[str]) -> None:
    assert not drain.run(0, stats_url="http://127.0.0.1:1", say=silent_ray.append)


def test_what_a_hook_says_is_in_the_pods_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kubernetes keeps it to itself, so that nobody learnt why a pod took twelve minutes to go."""
    log = tmp_path / "log"
    log.write_text("before\n")
    monkeypatch.setattr(command, "POD_LOG", str(log))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    command._tell("a")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    command._tell("b")
    monkeypatch.setattr(command, "POD_LOG", str(tmp_path / "nowhere" / "log"))
    command._tell("c")
    assert log.read_text() == "before\nmanta k8s drain: b\n"
    assert capsys.readouterr().err == "a\nb\nc\n"


@contextmanager
def haproxy_statistics(rows: list[str]) -> Iterator[str]:
    """A page as HAProxy writes it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = "\n".join(["# pxname,svname,qcur,qmax,scur,smax", *rows]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/stats;csv"
        server.shutdown()
        thread.join()


def test_streams_that_haproxy_carries_are_counted_once() -> None:
    rows = ["http,FRONTEND,,,7,9", "default,replica-1,0,0,2,3", "default,replica-2,0,0,1,3", "default,BACKEND,0,0,3,3"]
    with haproxy_statistics(rows) as url:
        assert streams_of_haproxy(url) == 3
    assert streams_of_haproxy(url) == 0, "where no HAProxy runs there are none"
