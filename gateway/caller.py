"""Whose request the running code serves. Knows the key's entry, never the key.

Each door's guard sets it before anything else of a request runs; it is a context variable, so that no route, and none
that is added later, can forget to pass it on.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from gateway.api_keys import ApiKey


@dataclass(frozen=True)
class Caller:
    """`key` is None where no keys are configured, and on public routes."""

    key: ApiKey | None

    @property
    def id(self) -> str:
        """The key's id, for logs and metrics; empty without one. Never the key."""
        return "" if self.key is None else self.key.id


ANONYMOUS = Caller(None)
_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Of the request that this task serves."""
    return _caller.get(ANONYMOUS)


def set_caller(caller: Caller) -> None:
    """For the guards, before anything else of a request runs."""
    _caller.set(caller)
