"""Draws a token from every row of probabilities: min_p, top_k, top_p, then inverse transform sampling.

Knows nothing of logits or sequences. A token's place among the more likely ones decides, and equally likely ones are
ranked by id. No row is sorted for that: probabilities are put into buckets by the first bits of their floats, and only
the bucket that a place falls into is looked through. Where float32 could round either way, the row is sorted after all.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.messages import SamplingParams

_DROPPED_BITS = 18  # of a float32: buckets go by its exponent and 5 bits of its mantissa, 32 of them an octave
_NUM_BUCKETS = 1 << 12  # 1.0 is in number 4064
# How far float32 was ever off in a share of a sum of 131,072 probabilities: 0.3e-6.
_DOUBT = 2.0**-21
_DOUBLE_DOUBT = 1e-10  # the same in float64, relative


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: the first 53 bits of their BLAKE2b digest."""
    key = struct.pack("<QIQ", seed & 0xFFFFFFFFFFFFFFFF, choice_index, position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] from `probabilities` [B, V] (fp32), one number in [0, 1) for each."""
    # Which way a row goes depends on its own parameters and probabilities only.
    plain = [row for row, p in enumerate(params) if not _is_filtered(p)]
    filtered = [row for row, p in enumerate(params) if _is_filtered(p)]
    chosen = torch.empty(len(params), dtype=torch.int64, device=probabilities.device)
    if plain:
        chosen[plain] = _invert(_rows(probabilities, plain), [uniforms[row] for row in plain])
    if filtered and not probabilities.is_cuda:  # a GPU sorts as fast as it copies
        found = _draw_from_buckets(
            _rows(probabilities, filtered), [params[row] for row in filtered], [uniforms[row] for row in filtered]
        )
        chosen[filtered] = torch.tensor([-1 if token_id is None else token_id for token_id in found])
        filtered = [row for row, token_id in zip(filtered, found, strict=True) if token_id is None]
    if filtered:
        chosen[filtered] = _draw_sorted(
            _rows(probabilities, filtered), [params[row] for row in filtered], [uniforms[row] for row in filtered]
        )
    return chosen


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _rows(probabilities: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return probabilities if len(rows) == len(probabilities) else probabilities[rows]


def _draw_from_buckets(
    probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]
) -> list[int | None]:
    """For each row what the sorted way would give, or None where that is in doubt."""
    buckets = probabilities.view(torch.int32) >> _DROPPED_BITS
    index, shape = buckets.long(), (len(params), _NUM_BUCKETS)
    mass = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, index, probabilities.double())
    mass = mass.flip(1).cumsum(1)  # of all buckets down to each
    if any(p.top_k for p in params):
        counts = torch.zeros(shape, dtype=torch.int32).scatter_add_(
            1, index, torch.ones((), dtype=torch.int32).expand(index.shape)
        )
        counts = counts.flip(1).cumsum(1)
    else:
        counts = torch.zeros(len(params), 0)
    rows = zip(probabilities.numpy(), buckets.numpy(), mass.numpy(), counts.numpy(), strict=True)
    return [_Ranking(*row).draw(p, number) for row, p, number in zip(rows, params, uniforms, strict=True)]


class _Ranking:
    """The tokens of one row from the most likely down, sorted only where somebody looks.

    Places are counted in buckets from the top: place 0 is the bucket of the highest probabilities.
    """

    def __init__(
        self,
        probabilities: NDArray[np.float32],  # [V]
        buckets: NDArray[np.int32],  # [V]
        mass: NDArray[np.float64],  # of all buckets down to each place
        counts: NDArray[np.int64],  # the same of tokens
    ) -> None:
        self._probabilities = probabilities
        self._buckets = buckets
        self._mass = mass
        self._counts = counts

    def draw(self, params: SamplingParams, number: float) -> int | None:
        """A token id by one number in [0, 1); None when in doubt."""
        total = float(self._mass[-1])
        if params.min_p > 0.0:
            total = self._mass_of_likely(params.min_p)
        if 0 < params.top_k < len(self._probabilities):
            total = min(total, self._mass_of_first(params.top_k))
        low = high = total
        if params.top_p < 1.0:
            low, high = self._mass_up_to(float(np.float32(params.top_p)), total)
        at = self._look(number * low)
        if at is None:
            return None
        token_id, before, after = at
        is_certain = before <= number * low * (1 - _DOUBLE_DOUBT) and number * high * (1 + _DOUBLE_DOUBT) < after
        return token_id if is_certain else None

    def _mass_of_likely(self, min_p: float) -> float:
        """Of tokens at least `min_p` as likely as the first."""
        floor = np.float32(min_p) * self._probabilities.max()
        place = _NUM_BUCKETS - 1 - int(floor.view(np.int32) >> _DROPPED_BITS)
        token_ids, mass = self._bucket(place)
        return float(mass[np.count_nonzero(self._probabilities[token_ids] >= floor)])

    def _mass_of_first(self, top_k: int) -> float:
        place = int(self._counts.searchsorted(top_k))
        if place and self._mass[place] == self._mass[place - 1]:
            return float(self._mass[place])  # a bucket of zeros may hold most of a vocabulary
        before = int(self._counts[place - 1]) if place else 0
        return float(self._bucket(place)[1][top_k - before])

    def _mass_up_to(self, top_p: float, total: float) -> tuple[float, float]:
        """At least and at most what the tokens have that are kept of a `total`."""
        at = self._look(top_p * total)
        if at is None:
            return (top_p - _DOUBT) * total, total
        _, before, after = at
        is_kept = before == 0.0 or before < (top_p - _DOUBT) * total  # the most likely one always is
        if is_kept and (top_p + _DOUBT) * total <= after:
            return after, after
        return (top_p - _DOUBT) * total, min((top_p + _DOUBT) * total + after - before, total)

    def _look(self, mass: float) -> tuple[int, float, float] | None:
        """The token where the running sum passes `mass`, and the sums before and after it."""
        place = int(self._mass.searchsorted(mass, side="right"))
        if place == _NUM_BUCKETS:
            return None
        token_ids, running = self._bucket(place)
        index = int(running.searchsorted(mass, side="right")) - 1
        if not 0 <= index < len(token_ids):  # between two sums of the same in different order
            return None
        return int(token_ids[index]), float(running[index]), float(running[index + 1])

    def _bucket(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The ids in a bucket in order, and the running sum before the first and after each."""
        (token_ids,) = (self._buckets == _NUM_BUCKETS - 1 - place).nonzero()
        probabilities = self._probabilities[token_ids]
        order = (-probabilities).argsort(kind="stable")
        running = np.empty(len(order) + 1)
        running[0] = self._mass[place - 1] if place else 0.0
        running[1:] = probabilities[order]
        return token_ids[order], running.cumsum()


def _draw_sorted(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] by the ranking of each row: what the buckets stand for."""
    device, vocabulary = probabilities.device, probabilities.shape[1]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    ranked = _descending(probabilities)
    # Multiplied, not filled: torch.masked_fill takes five times as long on a CPU.
    weights = ranked * (ranked >= min_p * ranked[:, :1])
    weights = weights * (torch.arange(vocabulary, device=device)[None] < top_k)
    share = weights / weights.sum(dim=-1, keepdim=True)
    above = share.cumsum(dim=-1) - share  # probability of everything more likely
    weights = weights * ((above < top_p) | (top_p >= 1.0))
    ranks = _invert(weights, uniforms)[:, None]
    likelihood = ranked.gather(1, ranks)
    num_before = ranks - (ranked > likelihood).sum(dim=-1, keepdim=True)  # of those as likely, by id
    are_likely = probabilities == likelihood
    return (are_likely & (are_likely.cumsum(dim=-1) == num_before + 1)).float().argmax(dim=-1)


def _descending(probabilities: torch.Tensor) -> torch.Tensor:
    if probabilities.is_cuda:
        return probabilities.sort(dim=-1, descending=True).values
    return torch.from_numpy(-np.sort(-probabilities.numpy(), axis=-1))  # a quarter of torch's time


def _invert(weights: torch.Tensor, uniforms: Seq[float]) -> torch.Tensor:
    """The column where the running sum of `weights` [B, V] passes its share of `uniforms`; never one of weight 0."""
    cumulative = weights.double().cumsum_(dim=-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=weights.device)[:, None] * cumulative[:, -1:]
    columns = torch.searchsorted(cumulative, targets, right=True)[:, 0]  # [B]
    past = (columns == weights.shape[1]).nonzero()[:, 0]  # rounded up to the total
    if len(past):
        columns[past] = (weights[past] > 0).cumsum(dim=-1).argmax(dim=-1)
    return columns
