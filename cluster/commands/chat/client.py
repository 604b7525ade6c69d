"""The HTTP side of `manta chat`: lists models and streams one answer from any OpenAI-compatible server.

Knows nothing of the terminal. Leaving `answer()` early closes the connection, which is how a server learns to stop.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from cluster.errors import MantaError, RequestError, Unavailable

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0  # between two pieces of an answer; a long prompt is silent while it is read

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delta:
    """One event of a streamed answer. `completion_tokens` comes with the usage, mostly last."""

    text: str = ""
    reasoning: str = ""  # what the model thinks before it answers
    finish_reason: str | None = None
    completion_tokens: int | None = None


class ChatClient:
    """One server. `url` may or may not end in /v1. Raises MantaErrors whose message is fit to show."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise RequestError(f"{url!r} is not a URL: {error}") from error
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=not _is_loopback(host),  # a proxy set for the internet does not reach this machine
        )

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names that the server lists."""
        with self._errors_told():
            response = self._http.get(f"{self.url}/v1/models")
            _raise_for_status(response)
            return [str(model["id"]) for model in response.json()["data"]]

    def answer(self, model: str, messages: list[dict[str, str]], sampling: dict[str, Any]) -> Generator[Delta]:
        """Stream one answer. A stream that stops without a finish reason raises Unavailable."""
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        finished = False
        with self._errors_told(), self._http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
            _raise_for_status(response)
            for data in _events(response.iter_bytes()):
                if data == "[DONE]":
                    break
                delta = _delta(json.loads(data))
                finished = finished or delta.finish_reason is not None
                yield delta
        if not finished:
            raise Unavailable("the server ended the stream before the answer was complete")

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unavailable(
                f"cannot connect to {self.url} ({error}): start a server with `manta serve`, "
                "or name a running one with --url"
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self.url} did not answer within {READ_TIMEOUT_S:g} s") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise RequestError(f"{self.url} is not an HTTP URL: {error}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the connection to {self.url} broke: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise Unavailable(f"{self.url} does not speak OpenAI's API: {error!r}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The `data:` of each server-sent event. Only \\n and \\r end a line: JSON may hold any other separator raw.

    Not httpx-sse, a package for these eight lines: it refuses a server that names another content type.
    """
    buffer = b""
    for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def _delta(event: Any) -> Delta:
    if event.get("error") or event.get("object") == "error":
        raise Unavailable(_message(event) or "the server reported an error without a message")
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")  # the newer name of others' servers
    return Delta(
        text=_of(str, delta.get("content")) or "",
        reasoning=_of(str, reasoning) or "",
        finish_reason=choices[0].get("finish_reason"),
        completion_tokens=_of(int, (event.get("usage") or {}).get("completion_tokens")),
    )


def _of(kind: type[T], value: Any) -> T | None:
    """What it is, or None. Raises TypeError for another kind."""
    if value is None or isinstance(value, kind):
        return value
    raise TypeError(f"{value!r} is no {kind.__name__}")


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        message = _message(response.json())
    except ValueError:
        message = None
    if response.status_code == 401:
        message = f"{message or 'the server wants an API key'}; --key-file FILE names the file of one"
    message = message or f"the server answered {response.status_code} {response.reason_phrase}"
    kind: type[MantaError] = RequestError if response.is_client_error else Unavailable
    raise kind(message)


def _message(body: Any) -> str | None:
    """The sentence in an error body: OpenAI's, Mistral's or FastAPI's shape."""
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    message = error or body.get("message") or body.get("detail")
    return str(message) if message else None
