"""What of transformers sends rows to the experts of a layer, asked without them, and followed where it nearly ties.

A choice is a near tie where the same code makes it of rows that are off by no more than rounding. So it is not told of
scores, which each family has in its own way. In bf16 there are some in most prompts: what comes after them differs
altogether, though nothing is wrong.

Shapes: R rows, D hidden size, K experts per token.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn

ROUNDING = {"float32": 1e-5, "bfloat16": 0.02}  # of rows, relative to their root mean square: a judgement
TRIES = 64  # of rows that are off


class _Reached(Exception):
    """Experts were, with these."""


class AskedGate:
    """Of one layer."""

    def __init__(self, block: Any, experts: Any, dtype: str) -> None:
        self._block, self._experts, self._rounding = block, experts, ROUNDING[dtype]

    @property
    def can_be_asked(self) -> bool:
        """A block that wants more than rows is not, nor where experts want less."""
        return len(signature(self._block.forward).parameters) == 1 < len(signature(self._experts.forward).parameters)

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Experts and weights [R, K] of `rows` [R, D] that the block is given; None: it does not come to experts."""

        def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            raise _Reached(*arguments)

        hook = self._experts.register_forward_pre_hook(reached, prepend=True)
        try:
            self._block(rows[None].to(self._experts.down_proj.device))
        except _Reached as arrived:
            return arrived.args[1].to(rows.device), arrived.args[2].to(rows.device)
        finally:
            hook.remove()
        return None

    def follow(
        self, rows: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """`experts` and `weights` [R, K], which the block chose of `rows` [R, D], as `wanted` [R, K] has them where
        they nearly tie; and how many rows that are.
        """
        experts, weights, ties = experts.clone(), weights.clone(), 0
        numbers = torch.Generator().manual_seed(0)
        wanted = wanted.to(experts)
        others = (experts.sort(1).values != wanted.sort(1).values).any(1)
        for place in others.nonzero().flatten().tolist():
            row = rows[place].float()  # [D]
            noise = torch.randn(TRIES, len(row), generator=numbers).to(row.device)
            said = self((row + self._rounding * row.square().mean().sqrt() * noise).to(rows.dtype))
            if said is None:
                break
            alike = (said[0].sort(1).values == wanted[place].sort().values).all(1).nonzero().flatten()
            if len(alike):
                experts[place], weights[place] = said[0][alike[0]], said[1][alike[0]]
                ties += 1
        return experts, weights, ties
