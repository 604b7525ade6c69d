"""Which requests arrive, and when: from a CSV as public traces of chat services have it, or made from a few numbers.

TIMESTAMP,ContextTokens,GeneratedTokens          Azure's LLM inference traces of 2023 and 2024
2023-11-16 18:01:51.1632340,4808,10
Timestamp,Model,Request tokens,Response tokens   BurstGPT, seconds
5,ChatGPT,472,18
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from cluster.errors import ConfigError

HOUR_S, DAY_S = 3600.0, 86400.0
_COLUMNS = {
    "timestamp": ("timestamp", "time", "arrival_time", "arrived_at"),
    "prompt": ("contexttokens", "request tokens", "prompt_tokens", "input_tokens", "input_length"),
    "output": ("generatedtokens", "response tokens", "output_tokens", "completion_tokens", "output_length"),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at_s: float  # since the trace's beginning
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Arrivals of a day that has a peak, with bursts and lengths of answers and prompts that differ."""

    rate: float = 2.0  # requests a second, on average without bursts
    hours: float = 24.0
    swing: float = 0.6  # by so much of the average the rate rises until 14:00, and falls until 2:00
    bursts: float = 4.0  # a day, on average
    burst_factor: float = 3.0  # times the rate of the hour
    burst_s: float = 300.0
    prompt: float = 1024.0  # tokens, on average
    output: float = 256.0
    spread: float = 0.8  # sigma of the logarithm of both lengths; 0: all are alike
    start: float = 0.0  # hour of the day

    @classmethod
    def parse(cls, text: str) -> Synthetic:
        """`rate=5,output=300`; what is not named is as it is here. Raises ConfigError."""
        known = {field.name: 0.0 for field in fields(cls)}
        values = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, number = item.partition("=")
            if name not in known:
                raise ConfigError(f"--synthetic: {name!r} is unknown; known are {', '.join(known)}")
            try:
                values[name] = float(number)
            except ValueError as error:
                raise ConfigError(f"--synthetic: {name}: {number!r} is no number") from error
        made = cls(**values)
        for name in ("rate", "hours", "prompt", "output"):
            if not 0 < getattr(made, name) < math.inf:
                raise ConfigError(f"--synthetic: {name}: expected a positive number")
        if not (0 <= made.swing <= 1 and made.bursts >= 0 and made.burst_factor >= 0 and 0 <= made.spread <= 3):
            raise ConfigError("--synthetic: swing is from 0 to 1, spread from 0 to 3, and bursts are not negative")
        return made

    def rate_at(self, seconds: float) -> float:
        """Of the hour, without bursts."""
        hour = self.start + seconds / HOUR_S
        return self.rate * (1 + self.swing * math.cos(2 * math.pi * (hour - 14) / 24))

    def arrivals(self, seed: int) -> list[Arrival]:
        """In order. The same seed makes the same."""
        rng = random.Random(seed)
        seconds = self.hours * HOUR_S
        burst_starts: list[float] = []
        at = rng.expovariate(self.bursts / DAY_S) if self.bursts else math.inf
        while at < seconds:
            burst_starts.append(at)
            at += rng.expovariate(self.bursts / DAY_S)
        most = self.rate * (1 + self.swing) * max(1.0, self.burst_factor)  # thinned (Lewis and Shedler, 1979)
        at, burst = 0.0, 0
        made: list[Arrival] = []
        while True:
            at += rng.expovariate(most)
            if at >= seconds:
                return made
            while burst < len(burst_starts) and burst_starts[burst] + self.burst_s <= at:
                burst += 1
            rate = self.rate_at(at)
            if burst < len(burst_starts) and burst_starts[burst] <= at:
                rate *= self.burst_factor
            if rng.random() * most < rate:
                made.append(Arrival(at, self._length(rng, self.prompt), self._length(rng, self.output)))

    def _length(self, rng: random.Random, mean: float) -> int:
        """Log-normal, with that mean."""
        if not self.spread:
            return max(1, round(mean))
        return max(1, round(rng.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread)))


def read_trace(file: Path, scale: float = 1.0) -> list[Arrival]:
    """In order, the first at 0. `scale`: so many times as many requests in the same time. Some are left out, or
    there are copies of them, each of which comes a little later. Raises ConfigError, with the line.
    """
    rows = sorted(_rows(file), key=lambda row: row.at_s)
    if not rows:
        raise ConfigError(f"--trace: {file} has no request")
    first, length = rows[0].at_s, rows[-1].at_s - rows[0].at_s
    if scale == 1.0:
        return [Arrival(row.at_s - first, row.prompt_tokens, row.output_tokens) for row in rows]
    copies = max(1, math.ceil(scale))
    period = length * (1 + 1 / len(rows)) or 1.0
    step = period / len(rows) / copies
    rng = random.Random(0)
    return sorted(
        (
            Arrival((row.at_s - first + copy * step) % period, row.prompt_tokens, row.output_tokens)
            for copy in range(copies)
            for row in rows
            if rng.random() * copies < scale
        ),
        key=lambda row: row.at_s,
    )


def _rows(file: Path) -> Iterator[Arrival]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines)
            header = [name.strip().lower() for name in next(reader, [])]
            columns = {}
            for wanted, names in _COLUMNS.items():
                found = [header.index(name) for name in names if name in header]
                if not found:
                    raise ConfigError(f"--trace: {file} has no column of {wanted}; one of {', '.join(names)}")
                columns[wanted] = found[0]
            for number, row in enumerate(reader, start=2):
                if not row:
                    continue
                try:
                    at_s = _seconds(row[columns["timestamp"]])
                    prompt, output = (int(float(row[columns[name]])) for name in ("prompt", "output"))
                except (ValueError, IndexError, OverflowError) as error:
                    raise ConfigError(f"--trace: {file}, line {number}: {error}") from error
                if output > 0:  # BurstGPT has requests that failed
                    yield Arrival(at_s, max(1, prompt), output)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--trace: {file} cannot be read: {error}") from error


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        whole, _, fraction = text.strip().replace("T", " ").partition(".")
        digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
        moment = datetime.fromisoformat(whole.removesuffix("Z") + fraction[len(digits) :].removesuffix("Z"))
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is no time")
    return seconds
