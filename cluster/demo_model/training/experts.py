"""Mixtral's experts as training computes them: rows sorted by expert, one product for each. Knows no training.

`transformers`' own loop adds each expert's rows into the sum with `index_add_` and gives each expert a gradient as
large as that of all of them. For experts this small, most of a step's time is that.
"""

from typing import Any

import torch
import torch.nn.functional as F


class SortedExperts(torch.autograd.Function):
    """x [N, D], weights [N, K], experts [N, K], gate_up [E, 2I, D], down [E, D, I] → [N, D]."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        x, weights, experts, gate_up, down = inputs
        order = experts.flatten().argsort(stable=True)  # [N*K], which choice comes where
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = experts.flatten().bincount(minlength=len(down)).tolist()
        rows = x[order // experts.shape[1]]  # [N*K, D]
        hidden = _products(rows, counts, gate_up.transpose(1, 2))  # [N*K, 2I]
        gate, up = hidden.chunk(2, dim=-1)
        inner = F.silu(gate) * up  # [N*K, I]
        answers = _products(inner, counts, down.transpose(1, 2))[places].view(*experts.shape, -1)  # [N, K, D]
        ctx.counts = counts
        ctx.save_for_backward(weights, order, places, rows, hidden, inner, answers, gate_up, down)
        return (answers * weights[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, order, places, rows, hidden, inner, answers, gate_up, down = ctx.saved_tensors
        [gradient] = gradients  # [N, D]
        of_weights = (answers * gradient[:, None]).sum(-1)  # [N, K]
        of_answers = gradient[order // weights.shape[1]] * weights.flatten()[order][:, None]  # [N*K, D]
        of_down = _outer(of_answers, inner, ctx.counts)
        of_inner = _products(of_answers, ctx.counts, down)  # [N*K, I]
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        of_hidden = torch.cat((of_inner * up * (sigmoid + silu * (1 - sigmoid)), of_inner * silu), dim=-1)
        of_gate_up = _outer(of_hidden, rows, ctx.counts)
        of_x = _products(of_hidden, ctx.counts, gate_up)[places].view(*weights.shape, -1).sum(1)  # [N, D]
        return of_x, of_weights, None, of_gate_up, of_down


def _products(rows: torch.Tensor, counts: list[int], matrices: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its matrix."""
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), matrices, strict=True)])


def _outer(left: torch.Tensor, right: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Each expert's gradient: the sum over its rows of one times the other."""
    return torch.stack([a.T @ b for a, b in zip(left.split(counts), right.split(counts), strict=True)])


def sort_experts(module: Any) -> None:
    """Has a `MixtralExperts` of transformers compute so while it trains; otherwise it does as ever."""
    eager = module.forward

    def forward(hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> Any:
        if not module.training:
            return eager(hidden, experts, weights)
        return SortedExperts.apply(hidden, weights, experts, module.gate_up_proj, module.down_proj)  # type: ignore[no-untyped-call]

    module.forward = forward
