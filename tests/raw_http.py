"""HTTP requests exactly as they are written, which HTTP libraries would tidy."""

from __future__ import annotations

import http.client
import json
from typing import Any


def send(url: str, method: str, path: str, key: str | None = None, host: str | None = None) -> tuple[int, Any, str]:
    """(status, body if it is JSON, WWW-Authenticate) of a request with the body `{}`."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", url.removeprefix("http://") if host is None else host)
        if key is not None:
            connection.putheader("Authorization", f"Bearer {key}")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "2")
        connection.endheaders(b"{}")
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers.get_content_type() == "application/json" and content
        return answer.status, json.loads(content) if is_json else None, answer.getheader("www-authenticate", "")
    finally:
        connection.close()


def spellings(path: str) -> list[str]:
    """The path, and what a guard that looks at its beginning may overlook."""
    encoded = "".join(f"%{ord(char):02x}" for char in path[1:])
    return [
        path,
        "/" + path,
        path + "/",
        path.upper(),
        path + ";x",
        path + "?a=/health",
        "/health/.." + path,
        "/./" + path[1:],
        "/" + path[1:].replace("/", "%2f"),
        "/" + encoded,
        "/health%2f.." + path,
        "/health;" + path,
        "//health" + path,
    ]
