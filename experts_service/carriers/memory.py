"""The coordinator's use of a lane's memory: rows into slots, answers out of them. Knows no socket and no replica.

An answer is copied to where it belongs as soon as its head has come, and only then are its slots free: its shard could
change it after it was looked at. `fast_path` alone has answers read where they lie, each number once, and it alone uses
the slots of a GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts_service.device import pin
from experts_service.wire.shared_memory import STATE_BYTES, SharedMemory
from experts_service.wire.slots import Slots

_STATE_WORDS = STATE_BYTES // 8


class LaneMemory:
    """Slots with rows that a shard was asked to run."""

    def __init__(self, memory: SharedMemory) -> None:
        self.slots = Slots(memory.num_slots)
        self._memory = memory
        self._was_pinned = False
        self._requests: memoryview = memory.requests.numpy().data
        self._answers: memoryview = memory.answers.numpy().data
        self.in_device = memory.in_device
        self.slot_bytes = memory.slot_bytes
        self.requests_at, self.answers_at = memory.requests.data_ptr(), memory.answers.data_ptr()
        self.states_at = memory.states.data_ptr()
        self._states = memory.states.view(torch.int64).numpy()

    def write(self, request_id: int, host: memoryview, row_bytes: int, row_indices: npt.NDArray[np.int64]) -> int:
        """Gather the rows `row_indices` [R] of `host`, the bytes of [T, D], into free slots.

        Returns what a head says of them: 1 for slot 0, and so on; 0: there is no room.
        """
        size = len(row_indices) * row_bytes
        first = self.slots.take(request_id, -(-size // self.slot_bytes))
        if first is None:
            return 0
        self._states[first * _STATE_WORDS] = 0  # its answer is told by a head
        start = first * self.slot_bytes
        if size == row_bytes == len(host):
            self._requests[start : start + size] = host
        else:
            place = rows_of(self._requests[start : start + size], row_bytes)
            rows_of(host, row_bytes).take(row_indices, 0, place, "clip")  # "raise" would copy once more
        return first + 1

    def answer(self, slot: int, like: Tensor) -> Tensor:
        """The answer there, of the shape and dtype of `like`, where it lies: for a GPU, which reads it by itself."""
        if not self._was_pinned:
            self._was_pinned = True
            self._memory.pin(pin)  # where the driver cannot, a copy of it is only slower
        start = (slot - 1) * self.slot_bytes
        return self._memory.answers[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def read(self, slot: int, answer: memoryview, *, in_device: bool = False) -> None:
        """Copy the answer that lies where a head with this `slot` says, in host memory or a GPU's."""
        start = (slot - 1) * self.slot_bytes
        if in_device and self.in_device is not None:
            self.in_device.read_to_host(start, answer)
        else:
            answer[:] = self._answers[start : start + len(answer)]


def rows_of(data: memoryview, row_bytes: int) -> npt.NDArray[np.uint8]:
    """The same bytes as rows [R, row_bytes]."""
    return np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
