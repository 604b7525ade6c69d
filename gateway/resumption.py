"""A generation that outlives its coordinator. Knows requests and chunks; knows neither Serve nor text.

    coordinator a   ── 0 1 2 3 ──✕
    coordinator b                 prompt + 0 1 2 3 ──▶ 4 5 6 … (the same tokens, sampled ones included)

What the client has is what arrived here, so nothing is lost or doubled: `Request.output_token_ids` says where to go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from cluster.errors import CoordinatorLost, EngineDead, Overloaded, Unavailable
from cluster.messages import Embedding, Request, TokenChunk
from gateway.coordinator_client import CoordinatorClient

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0  # between attempts; the first comes at once


async def generate(
    coordinator: CoordinatorClient, request: Request, resume_timeout_s: float
) -> AsyncGenerator[TokenChunk, None]:
    """Chunks of one choice to its end, from as many coordinators as it takes. Raises MantaError.

    A lost coordinator is an error only when none has gone on within `resume_timeout_s`, or the request's deadline.
    """
    output = request.output_token_ids
    begun = False  # whether the first chunk has arrived, from whichever coordinator
    attempt = 0
    pause_s = 0.0
    give_up_at = float("inf")
    asked = request
    while True:
        length = len(output)
        try:
            async with aclosing(_closable(coordinator.generate(asked))) as stream:
                async for chunk in stream:
                    output += chunk.token_ids
                    yield _resumed(chunk) if begun and attempt else chunk
                    begun = True
                    if chunk.finish_reason is not None:
                        return
            lost: Unavailable | Overloaded = CoordinatorLost(
                "the coordinator's stream ended before the answer was complete"
            )
        except (CoordinatorLost, EngineDead) as error:
            lost = error
        except Overloaded as error:
            if attempt == 0:
                raise
            lost = error
        now = time.monotonic()
        if len(output) > length or attempt == 0:  # it went on for a while: the time starts again
            give_up_at = now + min(resume_timeout_s, request.deadline - time.time())
            pause_s = 0.0
        if now + pause_s >= give_up_at:
            raise lost
        attempt += 1
        logger.warning("%s: attempt %d goes on after %d tokens: %s", request.request_id, attempt + 1, len(output), lost)
        await asyncio.sleep(pause_s)
        pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)
        # Another id: should the lost coordinator live on, its sequence is not this one.
        asked = replace(request, request_id=f"{request.request_id}~{attempt}", output_token_ids=output)


async def embed(
    coordinator: CoordinatorClient, requests: tuple[Request, ...], resume_timeout_s: float
) -> tuple[Embedding, ...]:
    """The embedding of each prompt; where a coordinator is lost, another one computes them all. Raises MantaError."""
    give_up_at = 0.0
    pause_s = 0.0
    while True:
        try:
            return await coordinator.embed(requests)
        except (CoordinatorLost, EngineDead) as error:
            now = time.monotonic()
            give_up_at = give_up_at or now + min(resume_timeout_s, requests[0].deadline - time.time())
            if now + pause_s >= give_up_at:
                raise
            logger.warning("%s: embedded again: %s", requests[0].request_id, error)
        await asyncio.sleep(pause_s)
        pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)


def _resumed(chunk: TokenChunk) -> TokenChunk:
    """Without what the client has from the first coordinator: facts about the prompt."""
    return replace(chunk, num_cached_tokens=0, prompt_logprobs=None)


def _closable(stream: AsyncIterator[TokenChunk]) -> AsyncGenerator[TokenChunk, None]:
    """A CoordinatorClient's streams are async generators."""
    return cast("AsyncGenerator[TokenChunk, None]", stream)
