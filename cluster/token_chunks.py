"""Chunks of one choice are joined and cut without loss. Knows how much they weigh on a wire; knows no wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from cluster.messages import TokenChunk

# Bytes, at most, of what a chunk is made of, pickled.
CHUNK_BYTES, TOKEN_BYTES, SCORE_BYTES, TOP_BYTES = 300, 8, 80, 24


def num_bytes(chunk: TokenChunk) -> int:
    """A bound of its size."""
    size = CHUNK_BYTES + TOKEN_BYTES * len(chunk.token_ids) + len(chunk.routed_experts or b"")
    if chunk.logprobs is None and chunk.prompt_logprobs is None:
        return size
    scores = chain(chunk.logprobs or (), chunk.prompt_logprobs or ())
    return size + sum(SCORE_BYTES + TOP_BYTES * len(score.top) for score in scores if score is not None)


def join(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """One chunk of consecutive ones."""
    if len(chunks) == 1:
        return chunks[0]
    last = chunks[-1]
    # The last may have no tokens, and nothing to say of them.
    scored = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    routed = [chunk.routed_experts for chunk in chunks if chunk.routed_experts is not None]
    return replace(
        last,
        first_position=chunks[0].first_position,
        prompt_logprobs=tuple(chain.from_iterable(scored)) if scored else None,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        routed_experts=b"".join(routed) if routed else None,
        logprobs=tuple(chain.from_iterable(logprobs)) if logprobs else None,
    )


def cut(chunk: TokenChunk, most_bytes: int) -> Iterator[TokenChunk]:
    """What joins to the chunk. All but the last have no tokens, only a part of a long prompt's log-probabilities."""
    scores = chunk.prompt_logprobs
    if scores is None or num_bytes(chunk) <= most_bytes:
        yield chunk
        return
    most_top = max((len(score.top) for score in scores if score is not None), default=0)
    step = max(1, most_bytes // (SCORE_BYTES + TOP_BYTES * most_top))
    nothing = replace(
        chunk,
        token_ids=(),
        logprobs=None if chunk.logprobs is None else (),
        routed_experts=None if chunk.routed_experts is None else b"",
        finish_reason=None,
        stop_token_id=None,
    )
    for start in range(0, len(scores), step):
        yield replace(nothing, prompt_logprobs=scores[start : start + step])
    yield replace(chunk, prompt_logprobs=None)
