"""A shard of a lane in a process of its own, of the group that is its argument. Says where it listens.

With `device` it has slots in what stands for a GPU's memory, for rows of 32 in bf16.

Layer 2 is where it can be caught: it says `computing` with half of an answer written, and goes on once standard input
has a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from experts_service.shard.server import LaneServer
from experts_service.wire.frame import LaneShape
from tests import fake_driver
from tests.experts_service.lanes import FINGERPRINT, GROUPS, HIDDEN, NUM_LAYERS, SECRET, in_place, maths

on_device = sys.argv[2:] == ["device"]
if on_device:
    fake_driver.install()
hidden, dtype = (32, torch.bfloat16) if on_device else (HIDDEN, torch.float32)
experts = GROUPS[int(sys.argv[1])].experts
run = in_place(maths(experts))


def wait_in_layer_2(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
    if layer == 2:
        if answers is not None:
            answers[: len(rows) // 2].fill_(7.0)
        print("computing" if answers is None else "computing into memory", flush=True)
        sys.stdin.readline()
    return run(layer, rows, counts, answers)


server = LaneServer(
    wait_in_layer_2,
    LaneShape(NUM_LAYERS, len(experts), hidden, dtype),
    secret=SECRET,
    fingerprint=FINGERPRINT,
    host="127.0.0.1",
    device=fake_driver.DEVICE if on_device else None,
)
server.start()
print(server.path, server.port, flush=True)
server._thread.join()
