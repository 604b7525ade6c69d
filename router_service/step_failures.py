"""What the sequences of a step that failed are told. Knows no queue, no model and no device.

A sequence is told an error of its own, without the step's traceback: that would keep the step's tensors alive on the
event loop, and could reach a client.
"""

from __future__ import annotations

import copy

from cluster.errors import MantaError, StepFailed, Unavailable


def told(error: Exception) -> MantaError:
    """What a sequence is told of it: an error that was designed, or StepFailed."""
    if isinstance(error, MantaError):
        return copy.copy(error)
    return StepFailed(f"a step of the engine failed ({type(error).__name__})")


def not_finite() -> Unavailable:
    """What a sequence is told whose values are NaN or infinite: nothing can be told from them."""
    return Unavailable("the model's output is not finite")
