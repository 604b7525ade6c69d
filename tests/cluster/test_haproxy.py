"""The HAProxy that `manta-haproxy` becomes, with a configuration like Serve's."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from cluster.commands.haproxy import part_clients
from tests.ports import free_port
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
global
    stats socket {directory}/cli mode 666 level admin expose-fd listeners
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
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


@contextmanager
def running(config: Path) -> Iterator[None]:
    """`manta-haproxy`, as Serve starts it."""
    command = [Path(sys.executable).with_name("manta-haproxy"), "-f", config, "-db"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def test_without_a_replica_it_answers_as_all_errors_are_and_its_admin_socket_is_its_users_only(tmp_path: Path) -> None:
    """It was a 500 in plain text, which no client takes for something that another try may mend.

    And anybody on the machine could tell HAProxy, by its admin socket, to send requests with their keys elsewhere.
    """
    tmp_path.chmod(0o755)
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(directory=tmp_path, port=port, gone=free_port()))
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        try:
            answers.append(httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10))
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
