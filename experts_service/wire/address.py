"""Where a shard listens, and how to listen and connect there. Knows sockets of both kinds; knows no frame.

Unix sockets lie in a directory that only this user may enter; a path is at most 107 bytes, so it is a short one. TCP
binds the node's Ray address and nothing else.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PATH_LIMIT = 107
_LONGEST_NAME = "/0123456789ab.sock"
_BACKLOG = 128
_SOCKET_BUFFER_BYTES = 4 * 2**20  # asked for; the kernel caps it
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}  # s, s, tries, ms


@dataclass(frozen=True, slots=True)
class LaneAddress:
    """Of one incarnation of a shard; asked for at every dial, because a shard that restarts listens elsewhere."""

    path: str  # of the Unix socket, for coordinators on the same node
    host: str
    port: int  # 0: no TCP
    node_id: str
    incarnation: str
    thread_id: int = 0  # of the one thread that computes there; 0: several do, or a GPU


def listen_unix(directory: Path | None = None) -> tuple[socket.socket, Path]:
    """A listening socket in the private directory; clears away those that dead processes left there."""
    directory = directory or private_directory()
    _clear(directory)
    path = directory / f"{secrets.token_hex(6)}.sock"
    draft = path.with_suffix(".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(draft))
        listener.listen(_BACKLOG)
        draft.rename(path)  # it has its name only once it answers, so `_clear` takes none that is about to
    except OSError:
        listener.close()
        raise
    return listener, path


def listen_tcp(host: str) -> socket.socket:
    """A listening socket on this address only, on a port of the kernel's choice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind((host, 0))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def connect(address: LaneAddress, node_id: str, timeout_s: float) -> socket.socket:
    """A connection to the shard: by its Unix socket where that is on this node, else by TCP. Raises OSError."""
    if address.path and address.node_id == node_id:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.settimeout(timeout_s)
            channel.connect(address.path)
            return tuned(channel)
        except OSError:
            channel.close()
            if not address.port:
                raise
    return tuned(socket.create_connection((address.host, address.port), timeout_s))


def tuned(channel: socket.socket) -> socket.socket:
    """The same socket, with large buffers, and over TCP without delay and with the peer's death noticed."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        channel.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    if channel.family != socket.AF_UNIX:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return channel


def private_directory(socket: str = _LONGEST_NAME, parent: str | None = None) -> Path:
    """A directory of mode 0700 that is ours, `manta-<uid>` in `parent` or among the temporary files.

    Its path is so short that `socket`, the longest one to lie below, can be bound there.
    """
    for candidate in (*filter(None, [parent]), tempfile.gettempdir(), "/tmp"):
        directory = Path(candidate) / f"manta-{os.geteuid()}"
        if len(os.fsencode(directory)) + len(socket) > _PATH_LIMIT:
            continue
        with suppress(OSError):
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                return directory
    return _unnamed_directory()  # somebody else took our name


@functools.cache
def _unnamed_directory() -> Path:
    """One for all that this process keeps."""
    return Path(tempfile.mkdtemp(prefix="manta-", dir="/tmp"))


def _clear(directory: Path) -> None:
    """Remove sockets at which nobody listens any more: their processes were killed."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:  # a full backlog: somebody does listen
                continue
