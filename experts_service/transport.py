"""What a transport is: it carries the rows of one layer to expert groups and brings the answers back. No maths, no Ray.

    flight = transport.send(layer, rows, parts)     # to every group, before any answer is read
    ...                                             # the coordinator works on another microbatch
    flight.wait()                                   # every part.answer is written, or ExpertUnavailable
    flight.close()                                  # in any case

Implementations: `local` (in this process), `object_store` (direct actor calls), `lane` (a connection per shard), and
`auto`, which takes lanes where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class GroupRows(NamedTuple):
    """What one group is asked in one dispatch: R rows of the batch, ordered by expert as the group lists them."""

    group: int
    row_indices: npt.NDArray[np.int64]  # [R], into the batch; a row comes once for each of its experts in this group
    counts: tuple[int, ...]  # rows of each expert of the group; their sum is R ≥ 1
    answers: Tensor  # [N, D] the combine buffer, contiguous, the same for all groups of a dispatch
    start: int  # the transport writes rows start … start + R of it
    replica_id: str | None = None  # whose share of the group's rows this is; None: any replica's

    @property
    def answer(self) -> Tensor:
        """This group's part [R, D] of the combine buffer."""
        return self.answers[self.start : self.start + len(self.row_indices)]


class Flight(Protocol):
    """Rows under way."""

    def wait(self) -> None:
        """Return once every part's `answer` is written. Raises ExpertUnavailable at the latest at the deadline."""

    def close(self) -> None:
        """Nobody waits for answers that have not come: they are written nowhere. On the sender's thread. Idempotent."""


class Answers(NamedTuple):
    """Where the answers of a dispatch lie: a table of pieces, in int64, by ascending row of the combine buffer."""

    table: int  # address of the first piece's entry: the first row of it, and the address where that lies
    stride: int  # int64 from one entry to the next
    number: int  # of pieces


class InPlaceFlight:
    """Rows under way whose answers need not be written anywhere."""

    def wait_in_place(self) -> Answers:
        """As `wait`, but the answers may lie elsewhere, until `release` is called.

        Others may change them meanwhile: read each number once, and look at what was made of it. If that is not
        finite, `wait` has the answers written, those that are not finite from others.
        """
        raise NotImplementedError

    def release(self) -> None:
        """The answers have been read."""
        raise NotImplementedError

    def wait(self) -> None:
        """As `Flight` has it."""
        raise NotImplementedError

    def close(self) -> None:
        """As `Flight` has it."""
        raise NotImplementedError


class Transport(Protocol):
    """How rows reach the groups. Used by one thread, the engine's."""

    @property
    def takes_device_rows(self) -> bool:
        """Whether rows that are on a device are better left there. They may be so without: then they are copied."""

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:
        """Send the batch `rows` [T, D] to the groups of `parts`; returns without waiting for any of them.

        `rows` are on the host, but where the experts are in this process or it `takes_device_rows`. `answers` of
        `parts` may be on a device.

        Where this raises, what was sent already is closed.
        """

    def close(self) -> None:
        """Let go of connections and threads. Idempotent."""
