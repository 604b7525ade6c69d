"""The slots of a connection's memory once more, on a GPU: rows and answers there come to no host. Knows no frame.

    requests    slot 0 · slot 1 · …     as in host memory, and by the same numbers
    answers     slot 0 · slot 1 · …

States of slots stay in host memory. A frame says in which of both its rows lie; its answer is beside them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from experts_service.device import wait_for_queue
from experts_service.device_memory import DeviceMemory, NotShared, create, granules, open_shared

_MOST_PROBED = 4096  # bytes


class DeviceSlots:
    """One end's. Used by one thread."""

    def __init__(self, memory: DeviceMemory, half: int) -> None:
        self._memory = memory
        self._half = half  # bytes of all requests, and of all answers

    @classmethod
    def create(cls, answers: Tensor, device: torch.device) -> tuple[DeviceSlots, int]:
        """Those of a shard on `device`, and the descriptor to send. `answers`: all of them in host memory.

        Both begin with the same bytes then, so the other end sees whether it reads what this one writes.
        Raises NotShared, or what a device raises that is gone.
        """
        memory, descriptor = create(granules(2 * answers.nbytes), device)
        try:
            probe = _some_bytes(answers.nbytes)
            answers[: probe.nbytes] = probe
            memory.write(answers.nbytes, probe.to(device))
            wait_for_queue(device)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(memory, answers.nbytes), descriptor

    @classmethod
    def open(cls, descriptor: int, answers: Tensor, device: torch.device) -> DeviceSlots:
        """A coordinator's, on its own `device`; `descriptor` stays the caller's, `answers` as above.

        Raises NotShared where it does not read what the shard wrote, or reads back something else than it writes.
        """
        memory = open_shared(descriptor, granules(2 * answers.nbytes), device)
        written = _some_bytes(answers.nbytes)
        memory.write(0, written.to(device))
        for at, expected in ((answers.nbytes, answers[: written.nbytes]), (0, written)):
            there = torch.zeros_like(expected, device=device)
            memory.read(at, there)
            if not torch.equal(there.cpu(), expected):
                raise NotShared("bytes that were copied are others")
        return cls(memory, answers.nbytes)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Requests and answers, uint8, for the shard's maths."""
        whole = self._memory.tensor()
        return whole[: self._half], whole[self._half : 2 * self._half]

    def write(self, at: int, rows: Tensor) -> None:
        """Copy `rows`, contiguous and on the device, to the requests' byte `at`: there when the queue is done."""
        self._memory.write(at, rows)

    def read(self, at: int, answer: Tensor) -> None:
        """Copy what lies at the answers' byte `at` to `answer`, contiguous and on the device. The same."""
        self._memory.read(self._half + at, answer)

    def read_to_host(self, at: int, answer: memoryview) -> None:
        """The same as bytes on the host, where they are when this returns."""
        there = torch.empty(len(answer), dtype=torch.uint8, device=self._memory.device)
        self.read(at, there)
        answer[:] = there.cpu().numpy().data


def _some_bytes(most: int) -> Tensor:
    return torch.frombuffer(bytearray(os.urandom(min(_MOST_PROBED, most))), dtype=torch.uint8)
