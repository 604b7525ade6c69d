"""The rows of one dispatch as bytes, and where their answers belong. Knows tensors' memory; knows no socket."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experts_service.carriers.memory import rows_of
from experts_service.transport import GroupRows


@dataclass(slots=True)
class LaneBatch:
    """What the frames of one dispatch are made of."""

    layer: int
    dtype: torch.dtype
    hidden: int
    rows: memoryview  # [T, D], as bytes
    answers: memoryview  # [N, D], as bytes
    row_bytes: int

    @classmethod
    def of(cls, layer: int, rows: Tensor, answers: Tensor) -> LaneBatch:
        """Of `rows` [T, D] and `answers` [N, D] on the host, these without gaps."""
        hidden, dtype = rows.shape[-1], rows.dtype
        of_rows, of_answers = _bytes_of(rows.contiguous()), _bytes_of(answers)
        return cls(layer, dtype, hidden, of_rows, of_answers, hidden * dtype.itemsize)

    def place(self, part: GroupRows) -> memoryview:
        """Where its answer [R, D] belongs."""
        start = part.start * self.row_bytes
        return self.answers[start : start + len(part.row_indices) * self.row_bytes]

    def gather(self, part: GroupRows) -> memoryview:
        """Its rows [R, D] as bytes."""
        if len(part.row_indices) == 1 and len(self.rows) == self.row_bytes:
            return self.rows
        return rows_of(self.rows, self.row_bytes).take(part.row_indices, axis=0).data.cast("B")


LaneRows = tuple[LaneBatch, GroupRows]  # what a frame is made of


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host, without gaps. It lives as long as somebody has the view.

    A fifth of what two calls of torch take for it, in every layer.
    """
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")
