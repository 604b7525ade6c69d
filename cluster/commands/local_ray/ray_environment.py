"""Ray's environment variables. Ray reads them when it is imported, so this runs before, and must not import it.

HAProxy in front, and replicas that talk gRPC to each other on one event loop, carry the streams with half to a third
of the CPU of Serve's own proxy; they also pass on every disconnect, where that proxy loses a gRPC client that leaves
while a message is being written. Both are read by the Ray processes themselves: on a cluster that others started, they
have to be set on every node.
"""

import atexit
import fcntl
import os
import random
import shutil
import socket
import sys
from pathlib import Path

from cluster.commands.local_ray.private_files import haproxy_directory, haproxy_files
from cluster.ray_variables import BASE, PORTS, haproxy
from experts_service.wire.address import private_directory

# Between two looks of Serve's controller at its replicas. Its own choice, 0.1, keeps the controller and Ray's GCS at
# 8 % of a core while nothing happens; with 1 it is 3 %. The engine and the experts have better use for the core.
_CONTROL_LOOP_INTERVAL_S = "0.5"
# Serve's controller gives a proxy three times this to start, by its own choice 15 s, and then kills it. `serve.start`
# waits for that proxy alone, for 60 s: on a busy machine it failed with "The actor never ran".
_PROXY_READY_S = "20"
# First ports of gateway replicas. gRPC lets two servers listen on one port, and each would then get calls of the other,
# so a second server has a range of its own.
_RANGES = {"HTTP": 30000, "GRPC": 40000}
_RANGE = 100  # ports
# Of a second server's HAProxy. The kernel gives nobody who connects one of these, so each is still free when HAProxy
# listens, which is the better part of a minute after it was chosen.
_OTHERS = range(20000, 25000)


def prepare() -> None:
    """Token authentication unless the user says otherwise, no usage reports, and our guard before Serve's own code."""
    for name, value in BASE.items():
        os.environ.setdefault(name, value)


def prepare_benchmark() -> None:
    """For one whose coordinator is this process: Ray's workers, the shards, do not give way to it.

    In a server both are workers, which Ray has give way to all else. Beside other work, 16 sequences of the bench model
    over 4 shards took 164 ms a step where the shards alone gave way, 96 where nobody did.
    """
    prepare()
    os.environ.setdefault("RAY_worker_niceness", "0")


def prepare_server() -> None:
    """For a Ray that we start ourselves: HAProxy and direct replicas, each unless the user says otherwise."""
    prepare()
    launcher = _haproxy_launcher()
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", _CONTROL_LOOP_INTERVAL_S)
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", _PROXY_READY_S)
    if launcher is None or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") != "1":
        return
    for name, value in haproxy(launcher).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")  # HAProxy is on this machine
    # It starts anew whenever a gateway comes or goes; the old one may end its streams. Ray's own choice is two minutes.
    os.environ.setdefault("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "3600")
    directory = haproxy_directory()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for name, path in haproxy_files(directory).items():
        os.environ.setdefault(name, path)
    for name, port in PORTS.items():
        os.environ.setdefault(name, str(_free_port(port)))
    for protocol, lowest in _RANGES.items():
        first = next((port for port in range(lowest, lowest + 10 * _RANGE, _RANGE) if _claim(port)), lowest)
        os.environ.setdefault(f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT", str(first))
        os.environ.setdefault(f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT", str(first + _RANGE))


def _haproxy_launcher() -> str | None:
    """Our `manta-haproxy`, beside the running interpreter or on the PATH."""
    beside = Path(sys.executable).with_name("manta-haproxy")
    return str(beside) if beside.exists() else shutil.which("manta-haproxy")


def _free_port(preferred: int) -> int:
    """`preferred`, or one of the others where a second server has it."""
    others = random.SystemRandom().sample(_OTHERS, 100)
    return next((port for port in (preferred, *others) if _claim(port)), preferred)


def _claim(port: int) -> bool:
    """Whether it is free, and ours from now on: another server that starts meanwhile does not listen yet either."""
    if not _is_free(port):
        return False
    claim = os.open(private_directory() / f"port-{port}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(claim)
        return False
    return True  # and stays open, and ours, as long as this process lives


def _is_free(port: int) -> bool:
    """Whether nobody listens on it, on whichever address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
