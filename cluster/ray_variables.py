"""Environment variables that Ray and Serve need wherever Manta runs. Ray reads them when it is imported.

Named once, for `manta serve` on one machine and for the pods on Kubernetes alike.
"""

from __future__ import annotations

GRPC_MESSAGE_BYTES = 64 * 2**20  # gRPC holds a whole message before our doors see it; Ray's own choice is 2 GiB

# Token authentication, no usage reports, and our guard before Serve's own code.
BASE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gateway.client_headers:middlewares",
}

# What HAProxy and the proxy behind it listen on besides the doors, and Ray's own choice.
PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}


def haproxy(launcher: str) -> dict[str, str]:
    """HAProxy in front, and replicas that talk gRPC to each other. `launcher` is where `manta-haproxy` is."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": launcher,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    }
