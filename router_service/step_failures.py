"""What was raised in a step: what its sequences are told, whether the device can go on. Knows no queue and no model.

A sequence is told an error of its own, without the step's traceback: that would keep the step's tensors alive on the
event loop, and could reach a client.
"""

from __future__ import annotations

import copy

import torch

from cluster.errors import MantaError, StepFailed, Unavailable

PROBE_BYTES = 16 * 2**20  # a device that has not even these left cannot run a step of one token


def told(error: Exception) -> MantaError:
    """What a sequence is told of it: an error that was designed, or StepFailed."""
    if isinstance(error, MantaError):
        return copy.copy(error)
    return StepFailed(f"a step of the engine failed ({type(error).__name__})")


def not_finite() -> Unavailable:
    """What a sequence is told whose values are NaN or infinite: nothing can be told from them."""
    return Unavailable("the model's output is not finite")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work might have gone well."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator, and CUDA's for pinned memory, raise what they raise for everything else.
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def check_device(device: torch.device, *, memory: bool) -> None:
    """Raises what the device raises when it is gone, or with `memory` when it has none left.

    After an error that sticks, everything that is asked of a CUDA context fails.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    if memory:
        torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device).fill_(1)
