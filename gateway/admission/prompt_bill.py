"""Which prompts of a request its caller owes. Knows tokens and errors; knows no coordinator and no door.

The tokens are taken when a request is admitted, as it is only known later what becomes of it. A prompt is owed once
something of its answer has come, and also by a client that did not wait for that: it may have been computed. What is
refused or fails before, whoever refuses it, costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from cluster.errors import DeadlineExceeded
from gateway.admission.caller import Caller

_DID_NOT_WAIT = (asyncio.CancelledError, GeneratorExit, DeadlineExceeded)


class PromptBill:
    """A context manager around the calls of coordinators."""

    def __init__(self, caller: Caller, prompts: Mapping[str, int]) -> None:
        """`prompts`: the number of tokens of each, by the id of its requests."""
        self._caller = caller
        self._waiting = dict(prompts)

    def answered(self, request_id: str) -> None:
        """Something of a prompt's answer has come."""
        if self._waiting:
            self._caller.prompt_done(self._waiting.pop(request_id, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, _DID_NOT_WAIT):
            self._caller.prompt_done(sum(self._waiting.values()))
        elif error is not None:
            self._caller.give_back()
