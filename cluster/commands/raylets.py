"""Whether the raylets of this machine answer: before one joins through them, since joining cannot be interrupted.

With a raylet that stands still, Ray's native code holds Python for half a minute and then ends the process.
"""

from __future__ import annotations

import os
from typing import Any

TIMEOUT_S = 5.0
_CHECK = "/grpc.health.v1.Health/Check"  # as Ray's GCS asks them


def silent(gcs: Any, here: str) -> bool:
    """Whether there are some on the machine `here`, and none answers. `gcs`: Ray's client of it, which answers."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return False  # with certificates of Ray's own, which are not read here
    infos = gcs.get_all_node_info(timeout=TIMEOUT_S).values()
    ports = [one.node_manager_port for one in infos if one.state == 0 and one.node_manager_address == here]  # 0: alive
    return bool(ports) and not any(answers(here, port) for port in ports)


def answers(host: str, port: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Whatever it says: that it wants a token, for example."""
    import grpc

    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        check = channel.unary_unary(_CHECK, request_serializer=bytes, response_deserializer=bytes)
        try:
            check(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            silence = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
            return bool(error.code() not in silence)
    return True
