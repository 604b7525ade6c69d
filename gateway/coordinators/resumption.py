"""A generation that outlives its coordinator. Knows requests and chunks; knows neither Serve nor text.

    coordinator a   ── 0 1 2 3 ──✕
    coordinator b                 prompt + 0 1 2 3 ──▶ 4 5 6 … (the same tokens, sampled ones included)

What the client has is what arrived here, so nothing is lost or doubled: `Request.output_token_ids` says where to go on.
A request that steps have failed with goes on elsewhere MAX_FAILED_STEPS times, and no more: the fault may be in it.
One whose coordinator no replica of a group has answered goes on at another one: the fault may be in its network. What
two coordinators say is an error; one that is asked again, as no other can be reached, says nothing new.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from cluster.errors import CoordinatorLost, EngineDead, ExpertUnavailable, MantaError, Overloaded, StepFailed
from cluster.messages import Embedding, Request, TokenChunk
from gateway.coordinators.client import CoordinatorClient, Generating

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 2  # of one request, whichever coordinator's; the next is an error
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0  # between attempts; the first comes at once


async def generate(
    coordinator: Generating, request: Request, resume_timeout_s: float
) -> AsyncGenerator[TokenChunk, None]:
    """Chunks of one choice to its end, from as many coordinators as it takes. Raises MantaError.

    A lost coordinator is an error only when none has gone on within `resume_timeout_s`, or the request's deadline; a
    failed step when it is one too many.
    """
    output = request.output_token_ids
    begun = False  # whether the first chunk has arrived, from whichever coordinator
    attempts = _Attempts(request, resume_timeout_s)
    asked = request
    while True:
        length = len(output)
        try:
            async with aclosing(_closable(coordinator.generate(asked))) as stream:
                async for chunk in stream:
                    output += chunk.token_ids
                    yield _resumed(chunk) if begun and attempts.number else chunk
                    begun = True
                    if chunk.finish_reason is not None:
                        return
            lost: MantaError = CoordinatorLost("the coordinator's stream ended before the answer was complete")
        except (CoordinatorLost, EngineDead, StepFailed) as error:
            lost = error
        except ExpertUnavailable as error:
            if not error.elsewhere:
                raise
            lost = error
        except Overloaded as error:
            if attempts.number == 0:
                raise
            lost = error
        await attempts.another(lost, went_on=len(output) > length)
        asked = replace(attempts.of(request), output_token_ids=output)


async def embed(
    coordinator: CoordinatorClient,
    requests: tuple[Request, ...],
    resume_timeout_s: float,
    *,
    has_begun: bool = False,
) -> tuple[Embedding, ...]:
    """The embedding of each prompt; where a coordinator is lost, another one computes them all. Raises MantaError.

    `has_begun`: others of the same client request are computed, so these wait for room where there is none.
    """
    attempts = _Attempts(requests[0], resume_timeout_s)
    asked = requests
    while True:
        try:
            return await coordinator.embed(asked)
        except (CoordinatorLost, EngineDead, StepFailed) as error:
            lost: MantaError = error
        except ExpertUnavailable as error:
            if not error.elsewhere:
                raise
            lost = error
        except Overloaded as error:
            if not has_begun and attempts.number == 0:
                raise
            lost = error
        await attempts.another(lost)
        asked = tuple(attempts.of(request) for request in requests)


class _Attempts:
    """How often a request was given to another coordinator, and until when that goes on."""

    def __init__(self, request: Request, timeout_s: float) -> None:
        self.number = 0
        self._request = request
        self._timeout_s = timeout_s
        self._failed_on: tuple[str, ...] = ()
        self._num_failed_steps = 0
        self._unanswered = ""  # the coordinator that had no answer from a group
        self._give_up_at = 0.0
        self._pause_s = 0.0

    async def another(self, lost: MantaError, *, went_on: bool = False) -> None:
        """Return when the next is due. Raises `lost` when there is to be none.

        The time starts again where tokens came; the count of failed steps does not.
        """
        if isinstance(lost, StepFailed):
            self._failed_on += (lost.coordinator,)
            self._num_failed_steps += 1
            if self._num_failed_steps > MAX_FAILED_STEPS:
                raise lost
        elif isinstance(lost, ExpertUnavailable):
            self._failed_on += (lost.coordinator,)
            if self._unanswered not in ("", lost.coordinator):
                raise lost
            self._unanswered = lost.coordinator
        now = asyncio.get_running_loop().time()
        if went_on or self.number == 0:
            self._give_up_at = now + min(self._timeout_s, self._request.deadline.at - now)
            self._pause_s = 0.0
        if now + self._pause_s >= self._give_up_at:
            raise lost
        self.number += 1
        logger.warning("%s: attempt %d: %s", self._request.request_id, self.number + 1, lost)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)

    def of(self, request: Request) -> Request:
        """As it is asked in this attempt. The id is another one: should the lost coordinator live on with its own."""
        return replace(request, request_id=f"{request.request_id}~{self.number}", failed_on=self._failed_on)


def _resumed(chunk: TokenChunk) -> TokenChunk:
    """Without what the client has from the first coordinator: facts about the prompt, and what came before its end."""
    return replace(chunk, num_cached_tokens=0, queue_s=0.0, prompt_logprobs=None)


def _closable(stream: AsyncIterator[TokenChunk]) -> AsyncGenerator[TokenChunk, None]:
    """A CoordinatorClient's streams are async generators."""
    return cast("AsyncGenerator[TokenChunk, None]", stream)
