"""Draws a token from every row of probabilities: min_p, top_k, top_p, then inverse transform sampling.

Knows nothing of logits or sequences. A token's place among the more likely ones decides, and equally likely ones are
ranked by id. This is the definition, on a CPU, which sorts rows; `compiled_draw.py` says the same of nearly all rows
without, and the sort is asked for where float32 could round either way. `device_draw.py` draws on a GPU.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.messages import SamplingParams
from experts_service.kernels.compiled import jit
from router_service.sampling.compiled_draw import IN_DOUBT, draw_rows


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: the first 53 bits of their BLAKE2b digest."""
    key = struct.pack("<QIQ", seed & 0xFFFFFFFFFFFFFFFF, choice_index, position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] from `probabilities` [B, V] (fp32), one number in [0, 1) for each."""
    if not jit.AVAILABLE:
        return _draw(probabilities, params, uniforms)
    token_ids = draw_rows(
        probabilities.contiguous().numpy(),
        np.array([p.top_k for p in params], np.int64),
        np.array([p.top_p for p in params], np.float64),
        np.array([p.min_p for p in params], np.float64),
        np.array(uniforms),
    )
    chosen = torch.from_numpy(token_ids)
    doubted = np.flatnonzero(token_ids == IN_DOUBT).tolist()
    if doubted:
        chosen[doubted] = _draw(
            probabilities[doubted], [params[row] for row in doubted], [uniforms[row] for row in doubted]
        )
    return chosen


def _draw(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    # Which way a row goes depends on its own parameters only.
    chosen = torch.empty(len(params), dtype=torch.int64, device=probabilities.device)
    for is_filtered, draw_part in ((False, _draw_in_order), (True, _draw_sorted)):
        rows = [row for row, p in enumerate(params) if _is_filtered(p) == is_filtered]
        if rows:
            part = probabilities if len(rows) == len(params) else probabilities[rows]
            chosen[rows] = draw_part(part, [params[row] for row in rows], [uniforms[row] for row in rows])
    return chosen


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _draw_in_order(probabilities: torch.Tensor, _params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    return _invert(probabilities, uniforms)


def _draw_sorted(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] by the ranking of each row."""
    device, vocabulary = probabilities.device, probabilities.shape[1]
    weights = ranked = _descending(probabilities)
    # Multiplied, not filled: torch.masked_fill takes five times as long on a CPU.
    if any(p.min_p for p in params):
        min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
        weights = weights * (ranked >= min_p * ranked[:, :1])
    if any(p.top_k for p in params):
        top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)[:, None]
        weights = weights * (torch.arange(vocabulary, device=device)[None] < top_k)
    if any(p.top_p < 1.0 for p in params):
        top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
        share = weights / weights.sum(dim=-1, keepdim=True)
        above = share.cumsum(dim=-1) - share  # probability of everything more likely
        weights = weights * ((above < top_p) | (top_p >= 1.0))
    ranks = _invert(weights, uniforms)[:, None]
    likelihood = ranked.gather(1, ranks)
    num_before = ranks - (ranked > likelihood).sum(dim=-1, keepdim=True)  # of those as likely, by id
    are_likely = probabilities == likelihood
    return (are_likely & (are_likely.cumsum(dim=-1) == num_before + 1)).float().argmax(dim=-1)


def _descending(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([_radix_sorted(row)[::-1] for row in probabilities.numpy()]))


def _radix_sorted(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of values that are not negative, whose bits are ordered as they are: half of numpy's time, an eighth of torch's.

    numpy sorts 16 bits by their digits: first the lower half of each value, then, keeping that order, the upper one.
    """
    halves = values.view(np.uint16).reshape(-1, 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    by_low = halves[:, low].argsort(kind="stable")
    by_value: NDArray[np.int64] = by_low[halves[by_low, high].argsort(kind="stable")]
    return values[by_value]


def _invert(weights: torch.Tensor, uniforms: Seq[float]) -> torch.Tensor:
    """The column where the running sum of `weights` [B, V] passes its share of `uniforms`; never one of weight 0."""
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None]
    cumulative = weights.double().cumsum_(dim=-1)
    columns = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]  # [B]
    past = (columns == weights.shape[1]).nonzero()[:, 0]  # rounded up to the total
    if len(past):
        columns[past] = (weights[past] > 0).cumsum(dim=-1).argmax(dim=-1)
    return columns
