"""Ray's environment variables. Ray reads them when it is imported, so this runs before, and must not import it."""

import os
import socket

# Ports of Serve's own, besides those of the doors. Two servers on one machine must not meet on Serve's fixed defaults.
_INTERNAL_PORTS = (
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
)


def prepare() -> None:
    """Token authentication unless the user says otherwise, and no usage reports."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def prepare_to_serve() -> None:
    """Also HAProxy in front instead of Serve's own proxy: the processes of a Ray that we start inherit this.

    Measured on 2 busy cores with the demo model, 16 streams (`manta bench serve --concurrency 16`): 362 tokens/s with
    Serve's own proxy, 564 with HAProxy. RAY_SERVE_THROUGHPUT_OPTIMIZED on top gave 783, but with Ray 2.60 both together
    lose some disconnects: a client that leaves within milliseconds goes unnoticed, and its sequence runs to the end.
    """
    prepare()
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0")
    for name in _INTERNAL_PORTS:
        os.environ.setdefault(name, str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
