"""Leaves out the oldest turns of a conversation that is too long. Knows lengths; how a chat is spelled is the reader's.

Whole turns go, from the front: what is left begins with what a user says, behind what instructs the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from cluster.errors import ContextTooLong
from gateway.protocol import Message

TokenIds = tuple[int, ...]


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
