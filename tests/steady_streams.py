"""Clients that stream one completion after another, and check each against what an undisturbed server said."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


async def choices_of_stream(client: httpx.AsyncClient, body: dict[str, object]) -> AsyncIterator[list[dict[str, Any]]]:
    """The `choices` of each event of a streamed completion. An error, as status or as event, fails the test."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                yield event["choices"]


@dataclass
class Seen:
    """What the clients saw together."""

    num_complete: int = 0
    failures: list[str] = field(default_factory=list)
    num_wrong: int = 0
    others: set[tuple[int, ...]] = field(default_factory=set)  # the answers that were
    longest_gap_s: float = 0.0  # between two tokens of a stream, or before its first

    def take_longest_gap(self) -> float:
        """That since the last call."""
        longest, self.longest_gap_s = self.longest_gap_s, 0.0
        return longest


class SteadyStreams:
    """As many clients as prompts, each with one of them again and again; greedy."""

    def __init__(
        self, url: str, model: str, prompts: list[str], num_tokens: int, headers: dict[str, str] | None = None
    ) -> None:
        self._url = url
        self._headers = headers
        self._bodies = [
            {
                "model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "return_token_ids": True,
            }
            for prompt in prompts
        ]  # fmt: skip
        self._num_tokens = num_tokens
        self._expected: list[list[int]] = []

    def learn(self) -> None:
        """Note what each prompt is answered with. Nothing may disturb the server meanwhile."""
        seen = Seen()

        async def learn() -> list[list[int]]:
            async with self._client() as client:
                return [await self._stream(client, body, seen) for body in self._bodies]

        self._expected = asyncio.run(learn())
        assert all(len(token_ids) == self._num_tokens for token_ids in self._expected)

    @property
    def answers(self) -> set[tuple[int, ...]]:
        """What was learned."""
        return set(map(tuple, self._expected))

    def run(self, seconds: float) -> Seen:
        """Start streams for so long, and let each end."""
        stop_at = time.monotonic() + seconds
        return self._run_while(lambda: time.monotonic() < stop_at, Seen())

    @contextmanager
    def running(self) -> Iterator[Seen]:
        """Stream while the caller does something else; its end waits until each stream has ended."""
        stop, seen = threading.Event(), Seen()
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(self._run_while, lambda: not stop.is_set(), seen)
            try:
                yield seen
            finally:
                stop.set()
            running.result()

    def _run_while(self, going_on: Callable[[], bool], seen: Seen) -> Seen:
        async def again_and_again(client: httpx.AsyncClient, index: int) -> None:
            while going_on():
                try:
                    token_ids = await self._stream(client, self._bodies[index], seen)
                except (httpx.HTTPError, AssertionError) as error:
                    seen.failures.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.5)
                    continue
                seen.num_complete += 1
                if token_ids != self._expected[index]:
                    seen.num_wrong += 1
                    seen.others.add(tuple(token_ids))

        async def run() -> None:
            async with self._client() as client, asyncio.TaskGroup() as tasks:
                for index in range(len(self._bodies)):
                    tasks.create_task(again_and_again(client, index))

        asyncio.run(run())
        return seen

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=120)

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> list[int]:
        token_ids: list[int] = []
        finished, last = False, time.monotonic()
        async for choices in choices_of_stream(client, body):
            for choice in choices:
                token_ids += choice["token_ids"]
                finished = finished or choice["finish_reason"] == "length"
            now = time.monotonic()
            seen.longest_gap_s, last = max(seen.longest_gap_s, now - last), now
        assert finished, f"a stream ended after {len(token_ids)} tokens"
        return token_ids
