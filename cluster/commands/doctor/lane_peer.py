"""A shard without weights, in a process of its own: answers rows with the same rows, until its standard input ends.

    python -m cluster.commands.doctor.lane_peer HIDDEN < secret

Prints where it listens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from experts_service.shard.server import LaneServer
from experts_service.wire.frame import LaneShape

FINGERPRINT = "doctor"


def _same(_layer: int, rows: Tensor, _counts: Sequence[int], _answers: Tensor | None) -> Tensor:
    return rows


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    secret = sys.stdin.readline().strip().encode()
    shape = LaneShape(1, 1, int(sys.argv[1]), torch.bfloat16)
    server = LaneServer(_same, shape, secret=secret, fingerprint=FINGERPRINT)
    server.start()
    print(server.path, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main()
