"""Reads a small file that says who may do what. Nobody but its owner may write it; knows nothing of what it holds."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from cluster.errors import ConfigError

MAX_BYTES = 2**20

logger = logging.getLogger(__name__)
_told: set[Path] = set()  # which are open to all, once for each


def read_guarded(path: Path, *, secret: bool = False) -> bytes:
    """Raises ConfigError; no message shows what is in the file.

    One that all may read is warned of only, because Kubernetes mounts a Secret so by itself, unless what is in it is
    the secret: then it is refused.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would keep us waiting
        try:
            mode = _checked_mode(path, os.fstat(descriptor), secret=secret)
            content = os.read(descriptor, MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is longer than {MAX_BYTES} bytes")
    if mode & 0o004 and path not in _told:
        _told.add(path)
        logger.warning("%s may be read by every user of this machine (mode %04o): chmod o-r %s", path, mode, path)
    return content


def _checked_mode(path: Path, status: os.stat_result, *, secret: bool) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a file")
    mode = stat.S_IMODE(status.st_mode)
    # Root's file may be read by our group: that is how a Secret is mounted for another user than root.
    is_mounted = status.st_uid == 0 != os.geteuid()
    if secret and mode & (0o037 if is_mounted else 0o077):
        raise ConfigError(f"others may read or write {path} (mode {mode:04o}): chmod 600 {path}")
    if mode & 0o022:
        raise ConfigError(f"{path} may be written by others (mode {mode:04o}): chmod go-w {path}")
    return mode
