"""Chooses a token from every row of logits on a GPU, the likeliest or a drawn one. Never waits for the device.

`draw.py` is the definition. Two things differ. Sums of probabilities are in integers, since torch's floating-point sums
on a GPU hang on how many rows there are: so a row's token is the same whatever else is in the batch, and that of
`draw.py` wherever float32 leaves no doubt. And a stable sort has the tokens' ids beside their probabilities.

Shapes: B rows, F of them filtered, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from cluster.messages import SamplingParams
from experts_service.device import upload

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them overflows
_ONE = 2.0**60  # a probability of 1 as an integer; the sum of a row is hardly more


def choose(logits: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] from `logits` [B, V] (fp32), one number in [0, 1) for each that is drawn."""
    likeliest = logits.argmax(dim=-1)
    drawn = [p.temperature >= GREEDY_BELOW for p in params]
    if not any(drawn):
        return likeliest
    vocabulary = logits.shape[1]
    filtered = [row for row, p in enumerate(params) if drawn[row] and _is_filtered(p)]
    is_drawn, temperature, numbers, rows, top_k, top_p, min_p, numbers_of_filtered = upload(
        [
            np.array(drawn),
            np.array([p.temperature if of_row else 1.0 for p, of_row in zip(params, drawn, strict=True)], np.float32),
            np.array(uniforms, np.float64),
            np.array(filtered, np.int64),
            np.array([params[row].top_k or vocabulary for row in filtered], np.int64),
            np.array([params[row].top_p for row in filtered], np.float32),
            np.array([params[row].min_p for row in filtered], np.float32),
            np.array([uniforms[row] for row in filtered], np.float64),
        ],
        logits.device,
    )
    probabilities = (logits / temperature[:, None]).softmax(dim=-1).nan_to_num_(0.0)  # [B, V]
    chosen = _invert(_units(probabilities), numbers)
    if filtered:
        part = probabilities.index_select(0, rows)  # [F, V]
        chosen.index_copy_(0, rows, _draw_ranked(part, top_k, top_p, min_p, numbers_of_filtered))
    return torch.where(is_drawn, chosen, likeliest)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _draw_ranked(
    probabilities: torch.Tensor,  # [F, V]
    top_k: torch.Tensor,  # [F], V: off
    top_p: torch.Tensor,  # [F], 1: off
    min_p: torch.Tensor,  # [F], 0: off
    uniforms: torch.Tensor,  # [F]
) -> torch.Tensor:
    """Token ids [F] by the ranking of each row."""
    ranked, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ranked.shape[1], device=ranked.device)
    kept = (ranked >= min_p[:, None] * ranked[:, :1]) & (ranks < top_k[:, None])
    units = _units(ranked) * kept
    sums = units.cumsum(dim=-1)
    above = (sums - units).double()  # of everything more likely
    units *= (above < top_p[:, None].double() * sums[:, -1:]) | (top_p[:, None] >= 1.0)
    return token_ids.gather(1, _invert(units, uniforms)[:, None])[:, 0]


def _units(probabilities: torch.Tensor) -> torch.Tensor:
    """As integers, of which no order of additions changes the sum."""
    return (probabilities.double() * _ONE).long()


def _invert(units: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The column [B] where the running sum of `units` [B, V] passes its share of `uniforms` [B]; never one of 0."""
    sums = units.cumsum(dim=-1)
    total = sums[:, -1:]
    target = torch.minimum((uniforms[:, None] * total.double()).long(), total - 1)  # rounded up to the total
    return torch.searchsorted(sums, target, right=True)[:, 0]
