"""Ray's environment variables. Ray reads them when it is imported, so this runs before, and must not import it.

Tried: HAProxy in front instead of Serve's own proxy (RAY_SERVE_ENABLE_HA_PROXY=1). On 2 busy cores with the demo model
and 16 streams (`manta bench serve --concurrency 16`) it gave 564 tokens/s instead of 362, and 783 to 1017 with
RAY_SERVE_THROUGHPUT_OPTIMIZED=1 on top. But with Ray 2.60 a client that leaves a plain request within milliseconds of
sending it then sometimes goes unnoticed, and its sequence runs to the end; Serve's own proxy notices every time.
"""

import os


def prepare() -> None:
    """Token authentication unless the user says otherwise, and no usage reports."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
