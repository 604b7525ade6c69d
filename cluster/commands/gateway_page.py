"""A page of a running gateway, for commands: read as far as a bound, with the token of its figures. Knows no page."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from cluster.errors import ConfigError

TIMEOUT_S, MAX_BYTES = 20.0, 64 << 20
_TOKEN = re.compile(rb"[ -~]+")


def read_page(url: str, path: str, token_file: Path | None = None) -> tuple[int, bytes]:
    """Status and content of a URL, or of `path` where that says only which gateway.

    Raises ConfigError where it cannot be reached, or has no end.
    """
    headers = {}
    if token_file is not None:
        token = token_file.read_bytes().partition(b"\n")[0].strip()
        if not _TOKEN.fullmatch(token):  # what refuses it as a header shows it
            raise ConfigError(f"{token_file}: its first line is no token, which is of ASCII's characters")
        headers["Authorization"] = f"Bearer {token.decode()}"
    try:
        address = httpx.URL(url if "://" in url else f"http://{url}")
        if address.path in ("", "/"):
            address = address.copy_with(path=path)
        content = bytearray()
        with httpx.stream("GET", address, headers=headers, timeout=TIMEOUT_S) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_BYTES:
                    raise ConfigError(f"{address} answers with more than {MAX_BYTES >> 20} MiB")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{url} cannot be reached: {error or type(error).__name__}") from error
    return response.status_code, bytes(content)
