"""The HAProxy that `manta-haproxy` becomes, with a configuration like Serve's."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import httpx
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from cluster.commands.haproxy import part_clients
from tests.haproxy import running, write_config
from tests.ports import free_port
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
frontend front
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
    port = free_port()
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(tmp_path / "cli"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_enabled=False,
        metrics_port=free_port(),
        stats_port=free_port(),
        timeout_client_s=2,
    )
    gone = BackendConfig("gone", "/gone", servers=[ServerConfig("one", "127.0.0.1", free_port())], app_name="gone")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as log:
        log.bind(("127.0.0.1", 0))
        log.settimeout(30)
        config.log_target = "{}:{}".format(*log.getsockname())
        file = tmp_path / "haproxy.cfg"
        HAProxyApi(config, {"gone": gone}, str(file))._generate_config_file_internal()

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
    assert not any("secret" in line for line in lines)
