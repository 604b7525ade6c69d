"""Memory that rows are received into, used again and again. Knows sizes and tensors; knows no socket.

Buffers are lent for one frame: from its first byte until its answer was written. Small batches of one size come back
thousands of times a second, so a buffer remembers the views that it gave.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_BYTES = 256 * 1024
KEPT_BYTES = 256 * 2**20  # of free buffers, in all; what is over goes back to the allocator
_REMEMBERED_VIEWS = 64


class ReceiveBuffer:
    """Some bytes, and views of their start as rows."""

    def __init__(self, capacity: int, dtype: torch.dtype, hidden: int, *, pinned: bool = False) -> None:
        memory = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        self.capacity = capacity
        self.view = memory.numpy().data  # [capacity]
        self._elements = memory.view(dtype)
        self._hidden = hidden
        self._views: dict[int, Tensor] = {}

    def rows(self, count: int) -> Tensor:
        """The first `count` rows [count, D]; valid until the buffer is lent again."""
        view = self._views.get(count)
        if view is None:
            view = self._elements[: count * self._hidden].view(count, self._hidden)
            if count <= _REMEMBERED_VIEWS:
                self._views[count] = view
        return view


class BufferPool:
    """Free buffers. Used by one thread."""

    def __init__(self, dtype: torch.dtype, hidden: int, *, pinned: bool = False) -> None:
        self._dtype = dtype
        self._hidden = hidden
        self._pinned = pinned
        self._free: list[ReceiveBuffer] = []
        self._free_bytes = 0

    def take(self, size: int = 0) -> ReceiveBuffer:
        """A buffer of at least `size` bytes; the one that came back last, if it is large enough."""
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].capacity >= size:
                buffer = self._free.pop(index)
                self._free_bytes -= buffer.capacity
                return buffer
        capacity = SMALLEST_BYTES
        while capacity < size:
            capacity *= 2
        return ReceiveBuffer(capacity, self._dtype, self._hidden, pinned=self._pinned)

    def give_back(self, buffer: ReceiveBuffer) -> None:
        """Take a buffer back; nobody may use views of it any more."""
        if self._free_bytes + buffer.capacity <= KEPT_BYTES:
            self._free.append(buffer)
            self._free_bytes += buffer.capacity
