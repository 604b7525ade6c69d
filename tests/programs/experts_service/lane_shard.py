"""A shard of a lane in a process of its own, of the group that is its argument. Says where it listens.

With `device` it has slots in what stands for a GPU's memory, for rows of 32 in bf16; with `cuda` in a real one's.

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

device = None
if sys.argv[2:] == ["device"]:
    fake_driver.install()
    device = fake_driver.DEVICE
elif sys.argv[2:] == ["cuda"]:
    device = torch.device("cuda")
hidden, dtype = (HIDDEN, torch.float32) if device is None else (32, torch.bfloat16)
experts = GROUPS[int(sys.argv[1])].experts
run = in_place(maths(experts))


def wait_in_layer_2(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
    if layer == 2:
        if answers is not None:
            answers[: len(rows) // 2].fill_(7.0)
        print("computing" if answers is None else "computing into memory", flush=True)
        sys.stdin.readline()
    if device is None or device.type == "cpu":
        return run(layer, rows, counts, answers)
    answer = run(layer, rows.to(device), counts, answers)
    torch.cuda.synchronize()
    return answer.cpu() if answers is None else answer


server = LaneServer(
    wait_in_layer_2,
    LaneShape(NUM_LAYERS, len(experts), hidden, dtype),
    secret=SECRET,
    fingerprint=FINGERPRINT,
    host="127.0.0.1",
    pinned=device is not None and device.type == "cuda",
    device=device,
)
server.start()
print(server.path, server.port, flush=True)
server._thread.join()
