"""HTTP requests exactly as they are written, which HTTP libraries would tidy."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HOST = b"Host: 127.0.0.1\r\n"
_POST = b"POST /v1/completions HTTP/1.1\r\n" + _HOST + b"Content-Type: application/json\r\n"
_GET = b"GET /v1/models HTTP/1.1\r\n" + _HOST
# What a client may send instead of a request → the status from HAProxy or, if it passes that, from a gateway; and where
# there is no HAProxy.
MALFORMED: dict[str, tuple[bytes, int, int]] = {
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\r\n\r\n", 400, 400),
    "words": (b"Hello, is this a server at all?\r\n\r\n", 400, 400),
    "an unknown version": (_GET.replace(b"1.1", b"9.9") + b"\r\n", 200, 400),
    "an unknown method": (_GET.replace(b"GET", b"FETCH") + b"\r\n", 400, 400),
    "a method in lower case": (_GET.replace(b"GET", b"get") + b"\r\n", 400, 400),
    "a method that we have not": (_GET.replace(b"GET", b"TRACE") + b"\r\n", 405, 405),
    "CONNECT": (b"CONNECT example.com:443 HTTP/1.1\r\n" + _HOST + b"\r\n", 400, 400),
    "no path": (b"OPTIONS * HTTP/1.1\r\n" + _HOST + b"\r\n", 404, 404),
    "a space in the path": (b"GET /v1/mo dels HTTP/1.1\r\n" + _HOST + b"\r\n", 400, 400),
    "a path that is no ASCII": (b"GET /\xff HTTP/1.1\r\n" + _HOST + b"\r\n", 400, 400),
    "no Host": (_GET.replace(_HOST, b"") + b"\r\n", 400, 400),
    "two Hosts": (_GET + b"Host: example.com\r\n\r\n", 400, 400),
    "a header without a colon": (_GET + b"nonsense\r\n\r\n", 400, 400),
    "a NUL in a header": (_GET + b"x: a\0b\r\n\r\n", 400, 400),
    "a long header": (_GET + b"x: " + b"y" * 20_000 + b"\r\n\r\n", 400, 200),
    "many headers": (_GET + b"x: y\r\n" * 200 + b"\r\n", 400, 200),
    "a long path": (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + _HOST + b"\r\n", 400, 404),
    "two lengths": (_POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, 400),
    "no length": (_POST + b"Content-Length: many\r\n\r\n{}", 400, 400),
    "a coding that nobody knows": (_POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, 400),
    "a body without an end": (_POST + b"Transfer-Encoding: gzip\r\n\r\n", 400, 400),
    "a chunk without a length": (_POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400, 400),
    "a compressed body": (_POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", 415, 415),
}
WEBSOCKET = (
    _GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def exchange(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body as long as they say) of the answer. Fails where it is no HTTP."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            content = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
        if headers.get("connection") == "close":
            assert connection.recv(1) == b"", "and nothing behind it"
        return response.status, headers, content


def check_error(status: int, headers: dict[str, str], content: bytes) -> None:
    """It is JSON in the one shape of all errors."""
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(content)
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["type"] == "internal_error") == (status == 500)


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


@contextmanager
def asking(url: str, path: str, body: dict[str, Any], key: str | None = None) -> Iterator[None]:
    """A client that has asked and waits for an answer. It leaves at the end of the block."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        connection.request("POST", path, json.dumps(body), headers)
        yield
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
