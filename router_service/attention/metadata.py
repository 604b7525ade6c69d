"""Where the tokens of one step lie in the cache. Knows positions and blocks; knows neither tensors nor layers.

Made once a step, used by every layer. What it costs does not grow with the context, but for the numbers of the blocks,
which are copied as they are from what each sequence keeps.

Shapes: T tokens of the step, B sequences that they are of, P blocks of the longest context.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence, positions start … start + length - 1, and the blocks of all its tokens so far."""

    start: int
    length: int
    block_table: array[int]

    @property
    def end(self) -> int:
        """Tokens that its last one sees, itself included."""
        return self.start + self.length


class AttentionMetadata:
    """The spans of a step as arrays."""

    def __init__(self, spans: Seq[Span], block_size: int) -> None:
        self.block_size = block_size
        starts = np.array([span.start for span in spans], dtype=np.int64)
        lengths = np.array([span.length for span in spans], dtype=np.int64)
        self.query_starts = np.zeros(len(spans) + 1, dtype=np.int32)  # [B + 1]: whose row is whose
        np.cumsum(lengths, out=self.query_starts[1:])
        self.context_lengths = (starts + lengths).astype(np.int32)  # [B], new tokens included
        num_blocks = [-(-span.end // block_size) for span in spans]
        self.block_tables = np.zeros(
            (len(spans), max(num_blocks, default=0)), dtype=np.int32
        )  # [B, P], 0 is the null block
        for row, span, number in zip(self.block_tables, spans, num_blocks, strict=True):
            row[:number] = np.frombuffer(span.block_table, dtype=np.int32, count=number)
        before = self.query_starts[:-1]
        self.positions = np.arange(self.query_starts[-1]) + np.repeat(starts - before, lengths)  # [T] int64
        self.write_slots = self.slots(np.repeat(np.arange(len(spans)), lengths), self.positions)  # [T] int64

    def slots(self, sequences: NDArray[np.int64] | np.int64, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the tokens at these positions of these sequences are: slot s of block b is b · block_size + s."""
        blocks: NDArray[np.int32] = self.block_tables[sequences, positions // self.block_size]
        return blocks.astype(np.int64) * self.block_size + positions % self.block_size
