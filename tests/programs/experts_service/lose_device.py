"""A shard that loses its device, or only runs out of the device's memory, as argv says: what becomes of its process."""

import sys
import threading

import torch

from experts_service.shard.shard import ExpertShard, ShardSpec


class OnCuda:
    """Experts whose maths fails on a GPU."""

    device = torch.device("cuda")

    def __call__(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def synchronize(_: object) -> None:
    if sys.argv[1] == "lost":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


torch.cuda.synchronize = synchronize
torch.cuda.empty_cache = lambda: None
shard = object.__new__(ExpertShard)  # without loading
shard._spec = ShardSpec("app", "", "", 0, (0,), 1, "bfloat16", "cuda")
shard._experts = OnCuda()  # type: ignore[assignment]
shard._one_at_a_time = threading.Lock()
rows = torch.zeros(1, 8)
rows.to = lambda *_, **__: rows  # type: ignore[method-assign]
try:
    shard._run(0, rows, (1,))
except torch.OutOfMemoryError:
    print("goes on")
