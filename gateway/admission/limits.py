"""What a key may ask for: requests and tokens a minute, and choices at once. Knows keys' entries; knows no door.

Each gateway replica counts for itself: with R replicas a key may get up to R times its limits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from cluster.errors import InvalidRequest, RateLimited
from gateway.admission.api_keys import ApiKey
from gateway.admission.bucket import Bucket

AT_ONCE = "choices at once"  # one of cluster.errors.KEY_LIMITS
CONCURRENCY_RETRY_S = 1.0  # a guess: who knows when a request of theirs ends


class KeyLimits:
    """The standing of one key."""

    def __init__(self, key: ApiKey, clock: Callable[[], float]) -> None:
        self.key = key
        self.num_running = 0  # choices; a request without any, and one whose choices are not known yet, is one
        self._clock = clock
        self._requests = _bucket(key.requests_per_minute, clock)
        self._tokens = _bucket(key.tokens_per_minute, clock)

    def update(self, key: ApiKey) -> None:
        """Take over an entry that was edited; a limit that is the same keeps its standing."""
        if key.requests_per_minute != self.key.requests_per_minute:
            self._requests = _bucket(key.requests_per_minute, self._clock)
        if key.tokens_per_minute != self.key.tokens_per_minute:
            self._tokens = _bucket(key.tokens_per_minute, self._clock)
        self.key = key

    def take_request(self) -> None:
        """Raises RateLimited, and takes nothing then."""
        self._check_tokens(1)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1)
            if wait_s > 0:
                raise self._refusal("requests per minute", self._requests.per_minute, wait_s)
        bound = self.key.max_concurrency
        if bound is not None and self.num_running >= bound:
            raise self._refusal(AT_ONCE, bound, CONCURRENCY_RETRY_S)
        if self._requests is not None:
            self._requests.take(1)
        self.num_running += 1

    def take_choices(self, number: int) -> None:
        """Of a request that was taken, which is one of them. Raises RateLimited or InvalidRequest."""
        bound = self.key.max_concurrency
        if bound is not None and number > bound:
            raise InvalidRequest(
                f"n: {number} choices are more than the {bound} at once of the API key {self.key.id!r}", param="n"
            )
        if bound is not None and self.num_running - 1 + number > bound:
            raise self._refusal(AT_ONCE, bound, CONCURRENCY_RETRY_S)
        self.num_running += number - 1

    def take_prompt(self, num_tokens: int) -> None:
        """Raises RateLimited, and takes nothing then."""
        self._check_tokens(num_tokens)
        self.take_output(num_tokens)

    def take_output(self, num_tokens: int) -> None:
        """Tokens that are there already: what exceeds the limit delays the next request."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def give_back(self, num_tokens: int) -> None:
        """Tokens that were taken, and then not worked on."""
        if self._tokens is not None:
            self._tokens.give_back(num_tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`."""
        found = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(bucket.remaining)
                found[f"x-ratelimit-reset-{name}"] = f"{math.ceil(bucket.reset_s)}s"
        return found

    def _check_tokens(self, num_tokens: int) -> None:
        if self._tokens is None:
            return
        wait_s = self._tokens.wait_s(num_tokens)
        if wait_s > 0:
            if self._requests is not None:
                wait_s = max(wait_s, self._requests.wait_s(1))
            raise self._refusal("tokens per minute", self._tokens.per_minute, wait_s)

    def _refusal(self, limit: str, bound: int, wait_s: float) -> RateLimited:
        message = f"the API key {self.key.id!r} is at its limit of {bound} {limit}; try again in {math.ceil(wait_s)} s"
        return RateLimited(message, retry_after_s=wait_s, limit=limit)


class Limiter:
    """The standing of every key at this gateway replica, and what Prometheus is told of it."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, KeyLimits] = {}
        self.requests = Counter("manta_key_requests", "Requests admitted, by key.", ["key"], registry=registry)
        self.refusals = Counter(
            "manta_key_refusals", "Requests refused at a limit of their key.", ["key", "limit"], registry=registry
        )
        self.tokens = Counter("manta_key_tokens", "Tokens, by key.", ["key", "kind"], registry=registry)

    def of(self, key: ApiKey) -> KeyLimits:
        """By the key's id, so that a key may be replaced without losing its standing."""
        limits = self._keys.get(key.id)
        if limits is None:
            limits = self._keys[key.id] = KeyLimits(key, self._clock)
        elif limits.key != key:
            limits.update(key)
        return limits


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, clock)
