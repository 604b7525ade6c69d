"""The coordinator's use of a lane's memory: rows into slots, answers out of them. Knows no socket and no replica.

An answer is copied to where it belongs as soon as its head has come, and only then are its slots free. It is not used
where it lies: its shard could change it after it was looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from experts_service.wire.shared_memory import SharedMemory
from experts_service.wire.slots import Slots

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class LaneMemory:
    """Slots with rows that a shard was asked to run."""

    def __init__(self, memory: SharedMemory) -> None:
        self.slots = Slots(memory.num_slots)
        self._slot_bytes = memory.slot_bytes
        self._requests: Bytes = memory.requests.numpy()
        self._answers: memoryview = memory.answers.numpy().data

    def write(self, request_id: int, host: Bytes, row_indices: npt.NDArray[np.int64]) -> int:
        """Gather the rows `row_indices` [R] of `host` [T, D · item] into free slots.

        Returns what a head says of them: 1 for slot 0, and so on; 0: there is no room.
        """
        count, row_bytes = len(row_indices), host.shape[1]
        size = count * row_bytes
        first = self.slots.take(request_id, -(-size // self._slot_bytes))
        if first is None:
            return 0
        start = first * self._slot_bytes
        place = self._requests[start : start + size]
        if count == 1:
            place[:] = host[row_indices[0]]
        else:
            host.take(row_indices, 0, place.reshape(count, row_bytes), "clip")  # "raise" would copy once more
        return first + 1

    def read(self, slot: int, answer: memoryview) -> None:
        """Copy the answer that lies where a head with this `slot` says."""
        start = (slot - 1) * self._slot_bytes
        answer[:] = self._answers[start : start + len(answer)]
