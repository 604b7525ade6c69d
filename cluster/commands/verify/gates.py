"""What of transformers sends rows to the experts of a layer, asked without them, and followed where it nearly ties.

A choice is a near tie where the same code makes it of rows that are off by no more than rounding. So it is not told of
scores, which each family has in its own way. In bf16 there are some in most prompts: what comes after them differs
altogether, though nothing is wrong. The experts may be the same, and their weights leap: Phi-3.5-MoE leaves out whose
score is a little too far from the first one's, and weighs the first otherwise than the second.

Shapes: R rows, D hidden size, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

ROUNDING = {"float32": 1e-5, "bfloat16": 0.03}  # of rows, relative to their root mean square: a judgement
LEAP = 0.1  # of a weight, relative to the largest of its row: more than rounding makes of it
TRIES = 64  # of rows that are off


@dataclass(frozen=True, slots=True)
class Routed:
    """Where rows are sent."""

    experts: torch.Tensor  # [R, K]
    weights: torch.Tensor  # [R, K]

    def by_expert(self) -> Routed:
        """Of each row the experts ascending."""
        experts, order = self.experts.sort(1)
        return Routed(experts, self.weights.gather(1, order))

    def is_like(self, other: Routed) -> torch.Tensor:
        """Of each row [R] whether it goes to the same experts, weighed alike. A weight that is NaN is not told."""
        mine, theirs = self.by_expert(), other.by_expert()
        leaps = (mine.weights - theirs.weights).abs().amax(1) > LEAP * theirs.weights.abs().amax(1)
        return (mine.experts == theirs.experts).all(1) & ~leaps

    def __getitem__(self, rows: Any) -> Routed:
        return Routed(self.experts[rows], self.weights[rows])


class _Reached(Exception):
    """Experts were, with these."""


class AskedGate:
    """Of one layer."""

    def __init__(self, block: Any, experts: Any, dtype: str) -> None:
        self._experts, self._rounding = experts, ROUNDING[dtype]
        router = getattr(block, "router", block)
        # Gemma 4's layer has both in it, and norms rows anew for the experts.
        self.is_apart = not _takes_rows(block) and _takes_rows(router)
        self.module: nn.Module = router if self.is_apart else block  # what is given rows

    @property
    def can_be_asked(self) -> bool:
        """What wants more than rows is not, nor where experts want less."""
        return _takes_rows(self.module) and len(signature(self._experts.forward).parameters) > 1

    def __call__(self, rows: torch.Tensor) -> Routed | None:
        """Where `rows` [R, D] are sent that `module` is given; None: it does not come to experts."""
        given = rows.to(self._experts.down_proj.device)
        if self.is_apart:
            _, weights, experts = self.module(given)
            return Routed(experts.to(rows.device), weights.to(rows.device))

        def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            raise _Reached(*arguments)

        hook = self._experts.register_forward_pre_hook(reached, prepend=True)
        try:
            self.module(given[None])
        except _Reached as arrived:
            return Routed(arrived.args[1].to(rows.device), arrived.args[2].to(rows.device))
        finally:
            hook.remove()
        return None

    def follow(self, rows: torch.Tensor, chosen: Routed, wanted: Routed) -> tuple[Routed, int]:
        """`chosen`, which is of `rows` [R, D], as `wanted` has it where they nearly tie; and how many rows that are."""
        experts, weights, ties = chosen.experts.clone(), chosen.weights.clone(), 0
        numbers = torch.Generator().manual_seed(0)
        wanted = Routed(wanted.experts.to(experts), wanted.weights.to(weights))
        for place in (~chosen.is_like(wanted)).nonzero().flatten().tolist():
            row = rows[place].float()  # [D]
            noise = torch.randn(TRIES, len(row), generator=numbers).to(row.device)
            said = self((row + self._rounding * row.square().mean().sqrt() * noise).to(rows.dtype))
            if said is None:
                break
            alike = said.is_like(wanted[place : place + 1]).nonzero().flatten()
            if len(alike):
                experts[place], weights[place] = said.experts[alike[0]], said.weights[alike[0]]
                ties += 1
        return Routed(experts, weights), ties


def _takes_rows(module: Any) -> bool:
    """And nothing else."""
    return len(signature(module.forward).parameters) == 1
