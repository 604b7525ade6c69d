"""Free ports for servers that tests start."""

import random
import socket

# Below those that the kernel gives to whoever asks for any and those of gateways, above those of Ray's workers and of a
# second server's HAProxy: between the choice and the start, half a minute later, nobody else takes one.
PORTS = range(25_000, 30_000)

_random = random.SystemRandom()  # workers that run tests side by side choose apart


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    while True:
        port = _random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
