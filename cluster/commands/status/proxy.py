"""Whether the proxy of this machine, which clients connect to, answers. Knows nothing of what is behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

TIMEOUT_S = 3.0
HEALTH_PATH = "/-/healthz"  # Serve's, which the proxy answers by itself
_ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # what it listens on, and what to ask


def proxy_answers(details: Mapping[str, Any]) -> bool:
    """Whether clients that connect to this machine are heard, whatever they are told."""
    options = details["http_options"]
    host = _ANY.get(options["host"], options["host"])
    url = httpx.URL(scheme="http", host=host, port=int(options["port"]), path=HEALTH_PATH)
    try:
        httpx.get(url, timeout=TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return True
