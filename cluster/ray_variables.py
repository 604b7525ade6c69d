"""Environment variables that Ray and Serve need wherever Manta runs. Ray reads them when it is imported.

Named once, for `manta serve` on one machine and for the pods on Kubernetes alike.
"""

from __future__ import annotations

from cluster.config import GatewayConfig

# The Service that KubeRay keeps at the head of the active Ray cluster; in pods only.
ACTIVE_HEAD = "MANTA_ACTIVE_HEAD"
# What Serve's proxies, which are given no configuration of ours, need of the gateway's: JSON.
DOORS = "MANTA_GATEWAY"
_OF_PROXIES = {"host", "api_keys_file", "max_body_bytes", "max_bytes_received", "body_timeout_s", "keepalive_s"}

# Token authentication, no usage reports, and our guard before Serve's own code.
BASE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gateway.edge.client_headers:middlewares",
}

# What HAProxy and the proxy behind it listen on besides the doors, and Ray's own choice.
PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}


def doors(gateway: GatewayConfig) -> dict[str, str]:
    """What bounds the gRPC servers of Serve's proxies, and where they listen."""
    return {DOORS: gateway.model_dump_json(include=_OF_PROXIES, exclude_defaults=True)}


def haproxy(launcher: str) -> dict[str, str]:
    """HAProxy in front, and replicas that talk gRPC to each other. `launcher` is where `manta-haproxy` is."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": launcher,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else a thousand lines are kept back, warnings among them
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # A gateway may go while HAProxy sends it a request on a connection that it kept, and HAProxy closes the
        # client's then, without an answer. Both of these make it ask another gateway instead, where it can: nothing
        # is stored, so a request may be sent twice. Of 2,900 requests, while 12 gateways were stopped, 5 connections
        # were closed with Ray's choice and none with this; while 13 were killed, 61 and 32.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # Between two looks at HAProxy, of which three have to fail before a dead one is started again. With Ray's own
        # choice, 10, its machine refused clients for 26 to 29 s, with 5 for 15 to 18, with 3 for 11 to 13. When
        # gateways come or go HAProxy starts anew, and says nothing for a moment: it should be longer than that.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "5",
    }
