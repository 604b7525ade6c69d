"""Cuts what is too long: the oldest turns of a conversation, or a prompt's tokens. Knows lengths; spells nothing.

Of a conversation whole turns go, from the front: what is left begins with what a user says, behind what instructs the
model. Tokens go wherever they stand, as vLLM's `truncate_prompt_tokens` has it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import ContextTooLong, InvalidRequest
from gateway.request.protocol import Message, SamplingFields

TokenIds = tuple[int, ...]
Cut = Callable[[Any], Any]


def read_cut(body: SamplingFields, context: int, max_tokens: int | None) -> Cut | None:
    """What shortens token ids as the body asks; None: nothing. Raises InvalidRequest."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        return None
    if asked != -1 and not 1 <= asked <= context:
        path = "truncate_prompt_tokens"
        raise InvalidRequest(f"{path}: must be -1 or between 1 and {context}, got {asked}", param=path)
    size = max(1, context - (max_tokens or 1)) if asked == -1 else asked
    return lambda ids: ids[:size] if body.truncation_side == "right" else ids[-size:]


def cut_ids(prompt: Any, cut: Cut) -> Any:
    """A raw prompt whose lists of token ids are cut; texts are once they are tokenized."""
    if not isinstance(prompt, list):
        return prompt
    if any(isinstance(item, str | list) for item in prompt):
        return [cut(item) if isinstance(item, list) else item for item in prompt]
    return cut(prompt)


def newest_turns(
    messages: Sequence[Message],
    room: int,
    encode: Callable[[Sequence[Message]], TokenIds],
    count: Callable[[Message], int],
) -> TokenIds:
    """The prompt of as many turns as leave it `room` tokens or fewer; of the last one, whatever its length, if none do.

    `encode` makes a prompt, or raises ContextTooLong. `count` says about how many tokens a message is, for few prompts
    to be made, and those not much longer than `room`.
    """
    prompts: dict[int, TokenIds] = {}  # by the place of the first turn that stays

    def fits(start: int) -> bool:
        try:
            prompt = encode([*messages[:num_instructing], *messages[start:]])
        except ContextTooLong:
            return False
        prompts[start] = prompt
        return len(prompt) <= room

    num_instructing = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    if fits(num_instructing):
        return prompts[num_instructing]
    size, oldest = 0, len(messages)
    while size <= room and oldest > num_instructing + 1:
        oldest -= 1
        size += count(messages[oldest])
    turns = [i for i in range(num_instructing + 1, len(messages)) if messages[i].role == "user"]
    near = [i for i in turns if i >= oldest] or turns[-1:] or [num_instructing]
    start = near[min(bisect_left(near, True, key=fits), len(near) - 1)]
    return prompts.get(start) or encode([*messages[:num_instructing], *messages[start:]])
