"""The log-probabilities of a prompt, computed for one choice and told with all. Knows deltas; knows no streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from cluster.messages import TokenLogprobs
from gateway.answer.choice import Delta


class PromptScores:
    """Of one prompt. Its first choice brings them, and the first delta of every choice has them."""

    def __init__(self) -> None:
        self._scores: tuple[TokenLogprobs | None, ...] | None = None
        self._are_here = asyncio.Event()

    async def shared(self, delta: Delta, *, is_first: bool) -> Delta:
        """The first delta of a choice, with them; one of another choice than the first waits until they are here."""
        if is_first:
            self._scores = delta.prompt_logprobs
            self._are_here.set()
            return delta
        await self._are_here.wait()
        return replace(delta, prompt_logprobs=self._scores)
