"""Ray's environment variables. Ray reads them when it is imported: this runs before, and must not import Ray itself."""

import os


def prepare() -> None:
    """Token authentication unless the user says otherwise, and no usage reports."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
