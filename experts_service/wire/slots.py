"""Which slots of a connection's memory are free. Plain numbers; knows no memory, no frame and no socket.

    slot    0  1  2  3  4  5  …
            a  a  a  –  b  –        a frame has adjacent slots, so that its rows lie in one piece

A slot is free again once the shard has replied to the frame that had it, or when the connection ends, which takes the
whole memory with it. That nobody waits any more frees nothing: the shard may be stopped in the middle of these rows,
and write their answer there whenever it goes on.
"""

from __future__ import annotations


class Slots:
    """Those of one connection. Used by one thread, the coordinator's."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._free = (1 << number) - 1  # a bit for each slot
        self._taken: dict[int, int] = {}  # request id → the bits of its slots

    def __len__(self) -> int:
        """Frames that have slots."""
        return len(self._taken)

    def take(self, request_id: int, count: int) -> int | None:
        """The first of `count` adjacent slots, the lowest there are; None: no room."""
        if count > self._number:
            return None
        starts = self._free
        for _ in range(count - 1):
            starts &= starts >> 1  # where one more free slot follows
        if not starts:
            return None
        lowest = starts & -starts
        taken = lowest * ((1 << count) - 1)
        self._free ^= taken
        self._taken[request_id] = taken
        return lowest.bit_length() - 1

    def give_back(self, request_id: int) -> None:
        """The shard has replied. Nothing where the frame had none."""
        self._free |= self._taken.pop(request_id, 0)
