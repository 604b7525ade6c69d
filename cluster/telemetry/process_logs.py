"""Where the lines of a coordinator, a supervisor and a shard go: ours from INFO on, those of libraries from WARNING on.

A gateway's are `gateway.telemetry.logs`' affair.
"""

from __future__ import annotations

import logging
import sys
import time

_OURS = ("cluster", "experts_service", "router_service")


def log_where_serve_does() -> None:
    """In the replica's own file, with its name and id.

    Serve writes there what its own logger is told. What others say on standard error it takes for an INFO of its own.
    """
    _log_to(logging.getLogger("ray.serve").handlers)


def log_to_standard_error() -> None:
    """Each line with its time in UTC, its level and its logger."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    _log_to([handler])


def _log_to(handlers: list[logging.Handler]) -> None:
    if logging.getLogger().hasHandlers():
        return  # whose process this is has its own, as a test's has
    logging.basicConfig(handlers=handlers)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
