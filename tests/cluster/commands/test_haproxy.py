"""The HAProxy that `manta-haproxy` becomes, with a configuration like Serve's."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import grpc
import httpx
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.commands.haproxy import open_files_needed, part_clients
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.http.authentication import READY_PATH
from gateway.service import SERVICER_FUNCTIONS
from tests.haproxy import running, with_open_files, write_config
from tests.ports import free_port
from tests.programs import REPOSITORY, program
from tests.raw_http import MALFORMED, check_error, exchange
from tests.waiting import wait_for

GRPC = """
backend http-gateway
    log global
    # Enable HTTP connection reuse for better performance
    http-reuse always

    server one 127.0.0.1:30000 check
frontend grpc_frontend
    bind 127.0.0.1:9000 proto h2
backend grpc_fallback_backend
    server other 127.0.0.1:9500 proto h2 check
backend grpc-gateway
    mode http
    http-reuse always
    server one 127.0.0.1:40000 proto h2 check
listen stats
"""
CONFIG = """
    errorfile 503 {directory}/500.http
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend nobody
backend nobody
    server gone 127.0.0.1:{gone}
"""


def test_no_connection_to_a_grpc_server_is_for_two_clients(tmp_path: Path) -> None:
    """One that ended, for whatever one client did, took the streams of all who shared it."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(GRPC)
    part_clients(config)
    before = "backend grpc_fallback_backend\n", "backend grpc-gateway\n    mode http\n    http-reuse always\n"
    after = (
        "backend grpc_fallback_backend\n    http-reuse never\n",
        "backend grpc-gateway\n    http-reuse never\n    mode http\n",
    )
    expected = GRPC.replace(
        "grpc_frontend\n",
        "grpc_frontend\n    max-session-srv-conns 1\n    http-request set-header x-manta-client %[src]:%[src_port]\n",
    )
    for old, new in zip(before, after, strict=True):
        expected = expected.replace(old, new)
    assert config.read_text() == expected


def test_without_a_replica_it_answers_as_all_errors_are_and_its_admin_socket_is_its_users_only(tmp_path: Path) -> None:
    """It was a 500 in plain text, which no client takes for something that another try may mend.

    And anybody on the machine could tell HAProxy, by its admin socket, to send requests with their keys elsewhere.
    """
    tmp_path.chmod(0o755)
    port = free_port()
    config = write_config(tmp_path, CONFIG.format(directory=tmp_path, port=port, gone=free_port()))
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        try:
            answers.append(httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60))
        except httpx.ConnectError:
            return False
        return True

    with running(config):
        wait_for(is_answered, 30, "HAProxy")
        assert stat.S_ISSOCK((tmp_path / "cli").stat().st_mode)
        assert stat.S_IMODE((tmp_path / "cli").stat().st_mode) == 0o600
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    assert answers[0].status_code == 503
    assert answers[0].headers["retry-after"] == "1"
    assert answers[0].json()["error"]["code"] == "unavailable"


def test_what_it_answers_itself_is_json_and_its_log_has_no_query(tmp_path: Path) -> None:
    """It was HTML, which clients that look for an `error` could not read, and a query may be a client's own words.

    A request that it cannot read as HTTP it answers before any file of its configuration counts.
    """
    gone = BackendConfig("gone", "/gone", servers=[ServerConfig("one", "127.0.0.1", free_port())], app_name="gone")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as log:
        log.bind(("127.0.0.1", 0))
        log.settimeout(30)
        log_target = "{}:{}".format(*log.getsockname())
        file, port = _configured(tmp_path, gone, timeout_client_s=2, log_target=log_target)

        def ask(path: str) -> tuple[int, dict[str, str], bytes]:
            return exchange(port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

        def is_up() -> bool:
            try:
                return ask("/")[0] == 503
            except OSError:
                return False

        with running(file):
            wait_for(is_up, 30, "HAProxy")
            answers = {what: exchange(port, request) for what, (request, _, _) in MALFORMED.items()}
            slow = exchange(port, b"GET / HTTP/1.1\r\nHo")
            asked = ask("/gone?secret")
            of_messages = [ask(path) for path in ("/v1/messages", "/v1/messages/count_tokens?beta=true")]
            by_backend = ask("/v1/messages_of_mine")
        lines = []
        while not any("/gone" in line for line in lines):
            lines.append(log.recv(65536).decode())
    assert answers["no path"][0] == 404
    assert answers["TLS"][0] == answers["a long header"][0] == 400
    assert answers["a coding that nobody knows"][0] == 501
    assert slow[0] == 408
    assert asked[0] == 503, "and so it is where there is no gateway yet"
    for answer in (*answers.values(), slow, asked):
        check_error(*answer)
        assert answer[1]["connection"] == "close"
    for status, headers, content in of_messages:
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        error = {"type": "overloaded_error", "message": "no gateway can be reached now; try again"}
        assert json.loads(content) == {"type": "error", "error": error}, "as Anthropic's clients read it"
    check_error(*by_backend)
    assert not any("secret" in line for line in lines)


class Gateway(BaseHTTPRequestHandler):
    """Well, and ready with the status that it is told."""

    status = 200
    asked: ClassVar[list[str]] = []

    def _answer(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status if self.path == READY_PATH else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("gateway", "drained", "expected"),
    [(200, False, (200, 200)), (503, False, (200, 503)), (200, True, (503, 503)), (None, False, (503, 503))],
    ids=["ready", "of a cluster that was replaced", "on a node that is drained", "none"],
)
def test_a_pod_is_ready_where_haproxy_is_well_and_its_gateway_says_so(
    tmp_path: Path, gateway: int | None, drained: bool, expected: tuple[int, int]
) -> None:
    """By Serve's own rules, with one path more: nobody is asked where HAProxy would say that it is not well."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("It", (Gateway,), {"status": gateway, "asked": (asked := [])}))
    port = free_port() if gateway is None else server.server_port
    backend = BackendConfig("gateway", "/", servers=[ServerConfig("one", "127.0.0.1", port)], app_name="gateway")
    has_received = {"has_received_routes": True, "has_received_servers": True}
    file, front = _configured(tmp_path, backend, pass_health_checks=not drained, **has_received)

    def status(path: str) -> int | None:
        try:
            return httpx.get(f"http://127.0.0.1:{front}{path}", timeout=60).status_code
        except httpx.TransportError:
            return None

    with _serving(server), running(file):
        wait_for(lambda: status("/-/healthz") == expected[0], 60, "HAProxy")
        assert status(READY_PATH) == expected[1]
        assert (READY_PATH in asked) == (gateway is not None and not drained)


def test_where_no_application_is_deployed_a_grpc_client_is_told_to_try_again(tmp_path: Path) -> None:
    """While a server starts or ends it was told NOT_FOUND, after which no client tries again."""
    options = gRPCOptions(port=free_port(), grpc_servicer_functions=SERVICER_FUNCTIONS)
    elsewhere = BackendConfig("elsewhere", "/elsewhere", app_name="elsewhere")
    file, _ = _configured(tmp_path, elsewhere, grpc_options=options)
    with running(file), grpc.insecure_channel(f"127.0.0.1:{options.port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
        with pytest.raises(grpc.RpcError) as told:
            chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest(), timeout=20)
    assert told.value.code() == grpc.StatusCode.UNAVAILABLE
    assert told.value.details() == "no gateway can be reached now; try again"


def test_it_starts_with_as_many_open_files_as_are_asked_for(tmp_path: Path) -> None:
    """And not with a quarter less, which is why `manta serve` looks before it starts anything."""
    needed = open_files_needed()
    servers = [ServerConfig(f"server-{index}", "127.0.0.1", free_port()) for index in range(30)]
    file, _ = _configured(tmp_path, BackendConfig("all", "/", servers=servers, app_name="all"))
    command = [Path(sys.executable).with_name("manta-haproxy"), "-f", file, "-D", "-p", tmp_path / "pid"]
    codes = {}
    for files in (needed * 3 // 4, needed):
        done = subprocess.run(command, capture_output=True, timeout=120, check=False, preexec_fn=with_open_files(files))
        codes[files] = done.returncode
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert codes == {needed * 3 // 4: 1, needed: 0}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_it_ends_with_the_process_that_started_it_and_so_do_those_that_it_took_over_from(tmp_path: Path) -> None:
    """On a machine whose raylet had died it was left, kept the port, and asked gateways that were gone."""
    port = free_port()
    config = write_config(tmp_path, CONFIG.format(directory=tmp_path, port=port, gone=free_port()), "60s")
    command = program("cluster.start_haproxy", Path(sys.executable).with_name("manta-haproxy"), config)
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as manager:
        assert manager.stdin is not None
        assert manager.stdout is not None
        started: list[psutil.Process] = []
        try:
            started.append(psutil.Process(int(manager.stdout.readline())))
            wait_for(lambda: _listens(port), 60, "HAProxy")
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                client.sendall(b"GET / HTTP/1.1\r\n")  # it is waited for
                manager.stdin.write("\n")
                manager.stdin.flush()
                started.append(psutil.Process(int(manager.stdout.readline())))
                wait_for(lambda: _listeners(port) == [started[1].pid], 60, "the one that takes over")
                assert started[0].status() != psutil.STATUS_ZOMBIE
                manager.kill()
                _, left = psutil.wait_procs(started, timeout=60)
        finally:
            manager.kill()
            for one in started:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
    assert not left, "nobody's"
    assert not _listens(port)


def test_it_does_not_start_on_a_machine_whose_raylet_has_ended(tmp_path: Path) -> None:
    """Its parent may have ended before it could ask to end with it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    config = write_config(tmp_path, CONFIG.format(directory=tmp_path, port=free_port(), gone=free_port()))
    for is_reaped in (False, True):
        if is_reaped:
            ended.wait(60)
        else:
            wait_for(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE, 60, "its end")
        done = subprocess.run(
            [Path(sys.executable).with_name("manta-haproxy"), "-f", config, "-db"],
            env={**os.environ, "RAY_RAYLET_PID": str(ended.pid)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "the raylet of this machine has ended" in done.stderr


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def _listeners(port: int) -> list[int | None]:
    return [one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr[1] == port]


def _configured(directory: Path, backend: BackendConfig, **changes: Any) -> tuple[Path, int]:
    """Serve's own configuration of these servers, and the port that it listens on."""
    port = free_port()
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(directory / "cli"),
        server_state_base=str(directory),
        server_state_file=str(directory / "server-state"),
        metrics_enabled=False,
        metrics_port=free_port(),
        stats_port=free_port(),
        **changes,
    )
    file = directory / "haproxy.cfg"
    HAProxyApi(config, {backend.name: backend}, str(file))._generate_config_file_internal()
    return file, port


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
