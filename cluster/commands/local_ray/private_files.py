"""Where a server that we start keeps the files of Ray and HAProxy: in folders that only this user may enter.

Ray opens its session folder to all, and HAProxy's admin socket, which can send requests elsewhere with the keys in
them, is everyone's too. Knows paths and modes; starts nothing. Imports no Ray.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.errors import SetupError
from experts_service.wire.address import private_directory

UMASK = 0o077
RAY_SESSIONS = Path("/tmp/ray")  # of a cluster that `ray start` made
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_HAPROXY = "ha-"
# HAProxy binds a socket under a longer name first. The folder in between is Serve's, named by the id of the node.
_HAPROXY_SOCKET = f"/{_HAPROXY}01234567/{'0' * 56}/cli.4194304.tmp"


def ray_directory() -> Path:
    """For `ray.init`, which opens it to all; the one that it lies in is closed. RAY_TMPDIR says on which disk.

    Unless that is too long for sockets, or may not be written.
    """
    wanted = os.environ.get("RAY_TMPDIR")
    if wanted:
        wanted = os.path.abspath(wanted)
        with suppress(OSError):
            os.makedirs(wanted, exist_ok=True)
    return private_directory(_RAY_SOCKET, wanted) / "ray"


def session_logs() -> Path | None:
    """The logs of Ray's last session on this machine, of `manta serve` or of `ray start`, whichever wrote last."""
    found = [root / "session_latest" / "logs" for root in (ray_directory(), RAY_SESSIONS)]
    return max((logs for logs in found if logs.is_dir()), key=lambda logs: logs.stat().st_mtime, default=None)


def haproxy_directory() -> Path:
    """A new one for this process, ours as long as it lives. Those of processes that were killed are cleared away."""
    parent = private_directory(_HAPROXY_SOCKET)
    with _locked(parent):
        for left in parent.glob(f"{_HAPROXY}*"):
            _remove_if_left(left)
        directory = Path(tempfile.mkdtemp(prefix=_HAPROXY, dir=parent))
        _lock(directory)
    return directory


def haproxy_files(directory: Path) -> dict[str, str]:
    """The variables by which Serve puts them there."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "cli"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


def secure_token() -> str | None:
    """Have Ray's token in a file of mode 0600 before Ray writes one that all can read. A warning for the user, if any.

    Who has the token can run code as this user. Raises SetupError where the file cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    except RuntimeError as error:
        raise SetupError("this user has no home directory, where Ray's token would lie: set HOME") from error
    try:
        if not named:
            _make_token(path)
        if not _is_open(path):
            return None
        if not named:
            with suppress(OSError):  # another's, or of a file system that has no modes
                path.chmod(0o600)
        if _is_open(path):
            return f"{path} holds Ray's token and is open to other users: chmod 600 {path}"
    except OSError as error:
        raise SetupError(f"{path}, the file of Ray's token: {error.strerror}") from error
    return (
        f"{path} was open to other users and is closed now. Who read it can run code as you: "
        "delete it, and start again, if others use this machine"
    )


def _is_open(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def _make_token(path: Path) -> None:
    """Unless there is one: complete when it gets its name, and never in place of one that came meanwhile."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".auth_token-{secrets.token_hex(6)}")
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)


def _remove_if_left(directory: Path) -> None:
    try:
        lock = _lock(directory)
    except OSError:  # its process lives, or somebody else has just removed it
        return
    shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Nobody clears away a folder that another process has made and not locked yet."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> int:
    """Held until the process ends, or the descriptor is closed. Raises OSError where another has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
