"""What one sequence wishes of its logits as one compiled call. Knows no parameters, no batch and no tensor.

Shapes: V vocabulary. An array of no length is a wish that nobody has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experts_service.kernels.jit import kernel


@kernel
def adjust(
    logits: NDArray[np.float32],  # [V] is changed in place
    divisors: NDArray[np.float32],  # [V], 1 where there is no repetition penalty
    is_reward: bool,  # whether the divisors are below 1
    penalties: NDArray[np.float32],  # [V] is taken off
    bias_ids: NDArray[np.int64],
    bias: NDArray[np.float32],  # one of each
    mask: NDArray[np.uint8],  # [V / 8, rounded up]: a bit for every token that may come, from the lowest up
) -> None:
    """Repetition penalty, as in CTRL, arXiv 1909.05858; the other penalties, biases and a grammar's mask."""
    for token_id in range(len(divisors)):
        # Positive ones are divided, negative ones multiplied: the lower result, or, of a reward, the higher one.
        multiplied, divided = logits[token_id] * divisors[token_id], logits[token_id] / divisors[token_id]
        logits[token_id] = multiplied if (divided > multiplied) != is_reward else divided
    for token_id in range(len(penalties)):
        logits[token_id] -= penalties[token_id]
    for index in range(len(bias_ids)):
        logits[bias_ids[index]] += bias[index]
    for byte in range(len(mask)):
        if mask[byte] != 0xFF:
            for bit in range(min(8, len(logits) - 8 * byte)):
                if not mask[byte] >> bit & 1:
                    logits[8 * byte + bit] = -np.inf
