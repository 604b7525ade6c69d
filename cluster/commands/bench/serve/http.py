"""The HTTP client of `manta bench serve`: sends one streamed request and keeps when each piece came.

Pieces are parsed only when the whole load is over: the client shares the machine with the server it measures, mostly.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from cluster.commands.bench.serve.figures import Outcome
from cluster.commands.bench.serve.load import Load
from cluster.errors import RequestError, Unavailable

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # between two pieces
LOOPBACK = {"127.0.0.1", "::1", "localhost"}  # a proxy set for the internet does not reach this machine
DETAIL_LENGTH = 300


@dataclass(slots=True)
class HttpAnswer:
    """The raw bytes of one stream, with the moment of each."""

    due: float
    forced_length: int | None  # tokens that the answer has to have; None: as many as the model likes
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None
    detail: str = ""

    def outcome(self) -> Outcome:
        """Tokens, times and usage. A stream that broke off, or says so itself, is an error."""
        if self.error is not None:
            return self._failed(self.error, self.detail)
        times: list[float] = []
        num_ids = 0
        usage: dict[str, Any] = {}
        finish_reason = None
        try:
            for moment, event in self._events():
                if "error" in event or event.get("object") == "error":
                    return self._failed("error in the stream", json.dumps(event))
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    finish_reason = choice.get("finish_reason") or finish_reason
                    ids = choice.get("token_ids") or ()
                    if ids or choice.get("text") or (choice.get("delta") or {}).get("content"):
                        times.append(moment)
                        num_ids += len(ids)
            output_tokens = int(usage.get("completion_tokens") or num_ids)
            prompt_tokens = int(usage.get("prompt_tokens") or 0)
        except (ValueError, TypeError, AttributeError) as error:
            return self._failed("not OpenAI's API", repr(error))
        if finish_reason is None:
            return self._failed("stream without an end", f"after {output_tokens} tokens")
        if not times:
            return self._failed("no tokens", f"finish_reason {finish_reason}")
        if not output_tokens:
            return self._failed("no token count", "the stream has neither usage nor token ids")
        if num_ids not in (0, output_tokens):
            return self._failed("wrong length", f"{num_ids} token ids, and {output_tokens} tokens by its usage")
        if self.forced_length is not None and output_tokens != self.forced_length:
            return self._failed("wrong length", f"{output_tokens} tokens, not {self.forced_length}")
        return Outcome(self.due, self.end, tuple(times), prompt_tokens, output_tokens)

    def _events(self) -> list[tuple[float, dict[str, Any]]]:
        """Each event with the moment when its line was complete. httpx-sse reads a response only, not what was kept."""
        events, buffer = [], b""
        for moment, data in self.pieces:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                    events.append((moment, json.loads(line[5:])))
        return events

    def _failed(self, kind: str, detail: str) -> Outcome:
        return Outcome(self.due, self.end, error=kind, detail=detail[:DETAIL_LENGTH])


class HttpClient:
    """One server. `url` may or may not end in /v1."""

    def __init__(self, url: str, key: str | None, load: Load, *, chat: bool, extensions: bool) -> None:
        self.model = ""
        self._load = load
        self._chat = chat
        self._extensions = extensions
        base = url.rstrip("/").removesuffix("/v1")
        try:
            host = httpx.URL(base).host
        except httpx.InvalidURL as error:
            raise RequestError(f"{url!r} is not a URL: {error}") from error
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=host not in LOOPBACK,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """Raises Unavailable when the server does not answer, or lists none."""
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{self._http.base_url} lists no models: {error or type(error).__name__}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Unavailable(f"{self._http.base_url} lists no models as OpenAI's API does: {error!r}") from error

    async def send(self, number: int, due: float) -> HttpAnswer:
        answer = HttpAnswer(due, self._load.output_tokens if self._extensions else None)
        route = "/v1/chat/completions" if self._chat else "/v1/completions"
        try:
            async with self._http.stream("POST", route, json=self._body(number)) as response:
                if response.is_success:
                    async for data in response.aiter_raw():
                        answer.pieces.append((time.perf_counter(), data))
                else:
                    answer.detail = (await response.aread()).decode(errors="replace")
                    answer.error = f"HTTP {response.status_code}"
        except httpx.ConnectError as error:
            answer.error, answer.detail = "no connection", str(error)
        except httpx.TimeoutException as error:
            answer.error, answer.detail = "timeout", repr(error)
        except httpx.HTTPError as error:
            answer.error, answer.detail = "broken stream", repr(error)
        answer.end = time.perf_counter()
        return answer

    def _body(self, number: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self._load.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._chat:
            body["messages"] = [{"role": "user", "content": self._load.text(number)}]
        else:
            body["prompt"] = self._load.prompt(number)
        return body | ({"ignore_eos": True, "return_token_ids": True} if self._extensions else {})
