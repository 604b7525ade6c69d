"""Starts a Ray of our own on this machine, whose files no other user may read. Knows nothing of Serve and of models."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

from cluster.commands.local_ray.private_files import UMASK, ray_directory, secure_token
from cluster.errors import SetupError

SERVER_OBJECT_STORE_BYTES = 512 * 2**20  # of `manta serve`: rows of a few prefills, no more lives there
_VITAL = ("raylet", "gcs_server")


def start_local_ray(object_store_bytes: int, **options: Any) -> None:
    """It ends with us, or with `ray.shutdown`. `options` are those of `ray.init`. Raises SetupError."""
    import ray

    directory, wanted = ray_directory(), os.environ.get("RAY_TMPDIR")
    if wanted and not directory.is_relative_to(os.path.abspath(wanted)):
        _warn(f"Ray's files go to {directory}: RAY_TMPDIR is too long for its sockets, or may not be written")
    warning = secure_token()
    if warning is not None:
        _warn(warning)
    os.umask(UMASK)  # of all processes from now on: Ray's, Serve's, HAProxy, and ours
    try:
        ray.init(
            address="local",  # else Ray joins a cluster that somebody runs on this machine
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(directory),
            **options,
        )
    except Exception as error:  # of any class, where a raylet takes too long for example
        raise SetupError(f"Ray did not start: {error}") from error


def what_died() -> str | None:
    """In words, which process ended that a Ray of our own cannot be without; None while all is well."""
    import ray

    node: Any = ray._private.worker._global_node
    for kind, process in node.dead_processes() if node is not None else ():
        if kind in _VITAL:
            code = process.returncode
            return f"{kind}, {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    return None


def _warn(text: str) -> None:
    print(f"Warning: {text}.", file=sys.stderr)
