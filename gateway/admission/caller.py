"""Whose request the running code serves, and what it uses up. Knows the key's entry, never the key.

Each door sets it before anything else of a request runs; it is a context variable, so that no route, and none
that is added later, can forget to pass it on.
"""

from __future__ import annotations

from contextvars import ContextVar

from cluster.errors import RateLimited
from gateway.admission.api_keys import ApiKey
from gateway.admission.limits import KeyLimits, Limiter


class Caller:
    """One request of a key; without a key (none are configured, or the route is public) nothing is limited."""

    def __init__(self, key: ApiKey | None = None, limiter: Limiter | None = None) -> None:
        self.id = "" if key is None else key.id  # for logs, metrics and the prefix cache
        self._limiter = limiter
        self._limits: KeyLimits | None = None if key is None or limiter is None else limiter.of(key)
        self._num_choices = 0  # that count as running; 0 outside
        self._held = 0  # prompt tokens that were taken and not worked on so far

    def enter(self) -> None:
        """Count a request. Raises RateLimited. Every `enter` needs a `leave`, which is harmless without."""
        if self._limiter is None or self._limits is None:
            return
        try:
            self._limits.take_request()
        except RateLimited as error:
            self._refused(error)
            raise
        self._num_choices = 1
        self._limiter.requests.labels(self.id).inc()

    def leave(self) -> None:
        self.give_back()
        if self._limits is not None:
            self._limits.num_running -= self._num_choices
        self._num_choices = 0

    def take_choices(self, number: int) -> None:
        """Once it is known how many a request asks for. Raises RateLimited, or InvalidRequest for more than can be."""
        if self._limits is None or not self._num_choices:
            return
        try:
            self._limits.take_choices(number)
        except RateLimited as error:
            self._refused(error)
            raise
        self._num_choices = number

    def take_prompt(self, num_tokens: int) -> None:
        """Before any of it is computed; what is not `prompt_done` at the end is given back. Raises RateLimited."""
        if self._limiter is None or self._limits is None:
            return
        try:
            self._limits.take_prompt(num_tokens)
        except RateLimited as error:
            self._refused(error)
            raise
        self._held += num_tokens

    def prompt_done(self, num_tokens: int) -> None:
        """So many of the tokens taken were computed, or may have been."""
        if self._limiter is not None and self._limits is not None and num_tokens:
            self._held -= num_tokens
            self._limiter.tokens.labels(self.id, "prompt").inc(num_tokens)

    def give_back(self) -> None:
        """The request was refused, or has failed: what of its prompt was not worked on costs nothing."""
        if self._limits is not None and self._held:
            self._limits.give_back(self._held)
        self._held = 0

    def take_output(self, num_tokens: int) -> None:
        """As tokens are generated; never refused."""
        if self._limiter is not None and self._limits is not None:
            self._limits.take_output(num_tokens)
            self._limiter.tokens.labels(self.id, "generation").inc(num_tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, as of now."""
        return {} if self._limits is None else self._limits.headers()

    def _refused(self, error: RateLimited) -> None:
        assert self._limiter is not None
        self._limiter.refusals.labels(self.id, error.limit).inc()


ANONYMOUS = Caller()
_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Of the request that this task serves."""
    return _caller.get(ANONYMOUS)


def set_caller(caller: Caller) -> None:
    """For authentication, before anything else of a request runs."""
    _caller.set(caller)
