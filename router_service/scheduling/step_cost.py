"""What the tokens of a step cost beside one another, so that a step can be bounded. Knows sizes; knows no sequence.

The unit is a prompt token with a short context, whose cost is that of the weights. From `attention_context` tokens on
its attention costs more than that, in proportion to its context; below, the cost is 1, and at most 2 in truth. The
log-probabilities of a prompt token cost as much as so many tokens more of context: 0.27 of the weights in the demo
model, where they were measured to take 0.26.

A decoding token reads its whole context for itself where those of a prompt read it together. Its attention costs
`DECODE_FACTOR` times as much per key: 13 to 20 times on 2 cores of an AMD EPYC (demo model, contexts of 3,000 to
30,000 tokens, batch 64).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from cluster.checkpoint.architecture import Architecture

DECODE_FACTOR = 16
NO_WINDOW = 2**40


@dataclass(frozen=True, slots=True)
class StepCost:
    """The costs of one model; as they come, a context costs nothing."""

    attention_context: int = 2**40  # tokens
    sliding_window: int = NO_WINDOW  # tokens; no context is longer
    score_context: int = 0  # tokens

    @classmethod
    def of(cls, architecture: Architecture) -> StepCost:
        """By the multiplications of one layer and token, where layers differ of the mean."""
        a = architecture
        attention = a.head_dim * a.hidden_size * (2 * a.num_heads + 2 * a.num_kv_heads)
        width = a.num_expert_layers * a.top_k * a.intermediate_size + sum(layer.dense_size for layer in a.layers)
        feed_forward = 3 * a.hidden_size * width // a.num_layers
        of_one_key = 2 * a.num_heads * a.head_dim  # q·k and p·v
        head = a.vocab_size * a.hidden_size
        return cls(
            -(-(attention + feed_forward) // of_one_key),
            a.sliding_window or NO_WINDOW,
            head // (a.num_layers * of_one_key),
        )

    def decode(self, context: int) -> int:
        """Of the one new token of a sequence."""
        return 1 + DECODE_FACTOR * min(context, self.sliding_window) // self.attention_context

    def chunk(self, start: int, num_tokens: int, *, scored: bool = False) -> int:
        """Of prompt tokens from position `start` on: each as if it were the last of them. `scored`: with their
        log-probabilities."""
        context = min(start + num_tokens, self.sliding_window) + (self.score_context if scored else 0)
        return max(num_tokens, num_tokens * context // self.attention_context)

    def longest_chunk(self, start: int, cost: int, *, scored: bool = False) -> int:
        """How many prompt tokens from position `start` on cost no more than this."""
        start = min(start, self.sliding_window) + (self.score_context if scored else 0)
        num_tokens = (isqrt(start * start + 4 * cost * self.attention_context) - start) // 2
        return min(cost, num_tokens)
