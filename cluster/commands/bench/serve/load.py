"""When requests are sent: a fixed number at a time, or at random moments whatever the server does. Knows no protocol.

With a rate the load is open: requests are due at the moments of a Poisson process with a fixed seed, and latency counts
from then, so that a server that falls behind cannot slow its own load down.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.commands.bench.serve.figures import Outcome
from cluster.errors import ConfigError

FIRST_ID, LAST_ID = 100, 1000  # prompts are ids that any vocabulary has
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests, how long, and when."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int | None = None
    rate: float | None = None  # a second
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.rate is not None:
            raise ConfigError("give either --concurrency or --rate, not both")

    def prompt(self, number: int) -> list[int]:
        """Random token ids, of each request its own: no prefix cache helps."""
        return random.Random(f"{self.seed}/{number}").choices(range(FIRST_ID, LAST_ID), k=self.prompt_tokens)

    def text(self, number: int) -> str:
        """About as many tokens, for servers that take only text."""
        return " ".join(random.Random(f"{self.seed}/{number}").choices(WORDS, k=self.prompt_tokens))

    def arrivals(self) -> list[float]:
        """Seconds from the start, with a rate."""
        assert self.rate is not None, "only an open load has arrivals"
        source = random.Random(self.seed)
        times, now = [], 0.0
        for _ in range(self.requests):
            times.append(now)
            now += source.expovariate(self.rate)
        return times

    def __str__(self) -> str:
        when = f"{self.rate:g} a second" if self.rate is not None else f"{self.concurrency or 1} at a time"
        return (
            f"{self.requests} requests, {when}, {self.prompt_tokens} prompt and {self.output_tokens} output tokens, "
            f"seed {self.seed}"
        )


class Recorded(Protocol):
    """What came back for one request, not looked at yet: reading it would take time from the others."""

    def outcome(self) -> Outcome: ...


class Client(Protocol):
    """One server."""

    async def send(self, number: int, due: float) -> Recorded:
        """Send request `number` now; it was due at `due` of `time.perf_counter`. Raises nothing that a server did."""


async def drive(client: Client, load: Load, on_done: Callable[[], None]) -> list[Outcome]:
    """All requests, in order, with times since the start."""
    start = time.perf_counter()
    recorded: list[Recorded] = []

    async def one(number: int, due: float) -> None:
        recorded.append(await client.send(number, due))
        on_done()

    if load.rate is not None:
        async with asyncio.TaskGroup() as tasks:
            for number, arrival in enumerate(load.arrivals()):
                await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
                tasks.create_task(one(number, start + arrival))
    else:
        numbers = iter(range(load.requests))

        async def worker() -> None:
            for number in numbers:
                await one(number, time.perf_counter())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(load.concurrency or 1):
                tasks.create_task(worker())
    outcomes = [since(start, one.outcome()) for one in recorded]
    return sorted(outcomes, key=lambda outcome: outcome.due_s)


def since(start: float, outcome: Outcome) -> Outcome:
    """The same with times relative to `start`."""
    return Outcome(
        due_s=outcome.due_s - start,
        end_s=outcome.end_s - start,
        token_times_s=tuple(t - start for t in outcome.token_times_s),
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        error=outcome.error,
        detail=outcome.detail,
    )
