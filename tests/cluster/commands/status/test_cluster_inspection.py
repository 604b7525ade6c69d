"""How a cluster is asked: what stands still costs its own wait, and is named; what answers is shown all the same."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from unittest import mock

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError, RpcError
from ray.serve import context
from ray.serve._private.application_state import ApplicationStatusInfo, StatusOverview
from ray.serve._private.common import DeploymentStatus, ReplicaState
from ray.serve.schema import ApplicationStatus

from cluster.commands.at_once import at_once
from cluster.commands.serve_controller import details, statuses
from cluster.commands.status import cluster_snapshot as snapshot
from cluster.commands.status.cluster_inspection import _answered, _heard
from cluster.commands.status.proxy import proxy_answers
from cluster.commands.status.served import application_told
from cluster.errors import ExpertUnavailable, Unavailable
from cluster.telemetry.kernels import ProcessKernels

MODEL = snapshot.ApplicationStatus(
    "m-00000000", "RUNNING", (snapshot.DeploymentStatus("coordinator", "HEALTHY", {"RUNNING": 1}),)
)
KERNELS = ProcessKernels("bfloat16", "dot", True, "znver4", "AVX512", "pages in place", "numba")
GATEWAY = snapshot.ApplicationStatus(
    "gateway", "RUNNING", (snapshot.DeploymentStatus("gateway", "HEALTHY", {"RUNNING": 2}),)
)


def test_all_are_waited_for_together() -> None:
    """Beside a controller that stood still, waits of five seconds added up to the end of the whole command."""
    stop = threading.Event()

    def fails() -> str:
        raise KeyError("gone")

    began = time.monotonic()
    answers: dict[str, Any] = at_once(
        {"a": lambda: "answered", "b": lambda: str(stop.wait(60)), "c": lambda: str(stop.wait(60)), "d": fails}, 2.0
    )
    assert time.monotonic() - began < 20
    stop.set()
    assert list(answers) == ["a", "d"]
    assert answers["a"] == "answered"
    assert isinstance(answers["d"], KeyError)


def test_who_does_not_come_back_in_time_is_silent() -> None:
    silent = _answered(GATEWAY, {}, with_kernels=False)
    assert silent.silent == 2
    assert _answered(GATEWAY, {("gateway", "silent"): 1}, with_kernels=False).silent == 1
    model = _answered(MODEL, {}, with_kernels=True)
    assert model.stats_error == "no coordinator answered within 4 s"
    assert model.kernels is not None
    assert model.kernels.deployments == {"coordinator": ()}
    broken = _answered(MODEL, {("m-00000000", "stats"): KeyError("gone")}, with_kernels=False)
    assert broken.stats_error == "'gone'"


def test_a_shard_that_stands_still_is_told_from_one_that_is_restarted() -> None:
    """Serve knows the process that watches it only, and a coordinator who sends it nothing misses nothing."""
    expert = snapshot.DeploymentStatus("expert-1", "HEALTHY", {"RUNNING": 3})
    restarted = ExpertUnavailable("the shard of expert group 1 is being restarted", is_restarting=True)
    assert _heard(expert, [KERNELS, GetTimeoutError("4 s"), restarted]) == replace(expert, silent=1, restarting=1)
    stands_still = ExpertUnavailable("the shard of expert group 1 does not answer", is_restarting=False)
    asked = [RayTaskError("kernels", "", one).as_instanceof_cause() for one in (restarted, stands_still)]
    assert _heard(expert, [KERNELS, *asked]) == replace(expert, silent=1, restarting=1)
    assert _heard(expert, [KERNELS, KERNELS, ActorDiedError()]) == expert, "Serve will say so"
    assert _heard(expert, []) == _heard(expert, None) == replace(expert, silent=3)
    starts = replace(expert, replicas={"STARTING": 1})
    assert _heard(starts, None) == starts


@pytest.fixture
def no_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test's connection to Serve is not this one's."""
    monkeypatch.setattr(context, "_cached_client_from_current_session", lambda: False)


@pytest.mark.usefixtures("no_serve")
def test_the_controller_is_waited_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def stands_still(asked: object, *, timeout: float) -> None:
        raise GetTimeoutError(f"{asked} within {timeout:g} s")

    monkeypatch.setattr(ray, "get", stands_still)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: mock.MagicMock())
    with pytest.raises(Unavailable, match="controller does not answer"):
        details()
    monkeypatch.setattr(ray, "get_actor", mock.Mock(side_effect=ValueError("no such actor")))
    assert details() == {"applications": {}, "proxies": {}}


@pytest.mark.usefixtures("no_serve")
def test_rays_gcs_is_waited_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked where the controller is, and Ray waits a minute for one that stands still."""
    goes_on = threading.Event()
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: goes_on.wait(60))
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"Ray's GCS did not say within 0\.1 s where Serve's controller is"):
        statuses(0.1)
    goes_on.set()
    assert time.monotonic() - began < 20
    monkeypatch.setattr(ray, "get_actor", mock.Mock(side_effect=RpcError("lost")))
    with pytest.raises(Unavailable, match="stands still"):
        statuses()


@pytest.mark.usefixtures("no_serve")
def test_statuses_are_read_from_the_controllers_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    told = StatusOverview(ApplicationStatusInfo(ApplicationStatus.RUNNING), "gateway").to_proto().SerializeToString()
    monkeypatch.setattr(ray, "get", lambda *_, **__: [told])
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: mock.MagicMock())
    assert statuses()["gateway"].app_status.status == "RUNNING"
    monkeypatch.setattr(ray, "get_actor", mock.Mock(side_effect=ValueError("no such actor")))
    assert statuses() == {}


def test_an_application_is_read_from_serves_details() -> None:
    running, starting = ReplicaState.RUNNING, ReplicaState.STARTING
    replicas = [{"state": running}, {"state": running}, {"state": starting}]
    told = {
        "status": ApplicationStatus.DEPLOYING,
        "message": "wait",
        "deployments": {
            "root": {"status": "HEALTHY", "message": "", "replicas": []},
            "gateway": {"status": DeploymentStatus.UPDATING, "message": "soon", "replicas": replicas},
        },
    }
    deployment = snapshot.DeploymentStatus("gateway", "UPDATING", {"RUNNING": 2, "STARTING": 1}, "soon")
    assert application_told("gateway", told) == snapshot.ApplicationStatus(
        "gateway", "DEPLOYING", (deployment,), "wait"
    )


def test_a_proxy_is_heard_whatever_it_says() -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert proxy_answers({"http_options": {"host": "0.0.0.0", "port": server.server_port}})


def test_a_proxy_that_accepts_and_says_nothing_is_not_heard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert not proxy_answers({"http_options": {"host": "127.0.0.1", "port": mute.getsockname()[1]}})
