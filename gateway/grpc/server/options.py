"""The options of our gRPC servers: what a connection may hold, and when it is asked whether it lives."""

from __future__ import annotations

import resource

from cluster.config import GatewayConfig

MESSAGE_MARGIN_BYTES = 64 * 1024  # so that what is a little too large is answered by us, with a request id
MAX_STREAMS = 100  # of one connection, as HAProxy allows its clients
# Each client of HAProxy, which has 4,096, has one of its own here at least; while it starts anew there are two of it.
MAX_CONNECTIONS = 8192  # or half the files that the process may open
MAX_METADATA_BYTES = 16 * 1024  # of a request; HAProxy passes on no more
KEEPALIVE_TIMEOUT_S = 20


def server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    """For grpc.aio.server."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ("grpc.max_receive_message_length", config.max_body_bytes + MESSAGE_MARGIN_BYTES),
        ("grpc.max_send_message_length", -1),  # an answer is as long as the request's own bounds let it be
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", min(MAX_CONNECTIONS, files // 2)),
        # Else gRPC grows the window of a stream to megabytes, also of a message that nobody reads yet.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may do the same.
        ("grpc.http2.min_ping_interval_without_data_ms", int(config.keepalive_s * 500)),
    ]
