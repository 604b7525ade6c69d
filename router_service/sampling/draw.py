"""Draws a token from every row of probabilities: min_p, top_k, top_p, then inverse transform sampling.

Knows nothing of logits or sequences. A token's place among the more likely ones decides, and equally likely ones are
ranked by id. No row is sorted for that: probabilities are put into buckets by the first bits of their floats, and only
the bucket that a place falls into is looked through. Where float32 could round either way, the row is sorted after all.

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

_DROPPED_BITS = 18  # of a float32: buckets go by its exponent and 5 bits of its mantissa, 32 of them an octave
_NUM_BUCKETS = 1 << 12  # 1.0 is in number 4064
# How far float32 was ever off in a share of a sum of 131,072 probabilities: 0.3e-6.
_DOUBT = 2.0**-21
_DOUBLE_DOUBT = 1e-10  # the same in float64, relative
_BLOCK = 128  # probabilities that are added up as one before anybody looks for a token


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: the first 53 bits of their BLAKE2b digest."""
    key = struct.pack("<QIQ", seed & 0xFFFFFFFFFFFFFFFF, choice_index, position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def draw(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] from `probabilities` [B, V] (fp32), one number in [0, 1) for each."""
    # Which way a row goes depends on its own parameters and probabilities only.
    chosen = torch.empty(len(params), dtype=torch.int64, device=probabilities.device)
    for is_filtered in (False, True):
        rows = [row for row, p in enumerate(params) if _is_filtered(p) == is_filtered]
        if not rows:
            continue
        part = _rows(probabilities, rows)
        its_params, its_uniforms = [params[row] for row in rows], [uniforms[row] for row in rows]
        if not is_filtered:
            chosen[rows] = _invert(part, its_uniforms)
        elif probabilities.is_cuda:  # sorts as fast as it copies
            chosen[rows] = _draw_sorted(part, its_params, its_uniforms)
        else:
            chosen[rows] = _draw_from_buckets(part, its_params, its_uniforms)
    return chosen


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _rows(probabilities: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return probabilities if len(rows) == len(probabilities) else probabilities[rows]


def _draw_from_buckets(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] as the sorted way would give them, which is asked only for rows where that is in doubt."""
    buckets = probabilities.view(torch.int32) >> _DROPPED_BITS
    index, shape = buckets.long(), (len(params), _NUM_BUCKETS)
    mass = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, index, probabilities.double())
    mass = mass.flip(1).cumsum(1)  # of all buckets down to each
    counts = torch.zeros(len(params), 0)
    if any(p.top_k for p in params):
        counts = torch.zeros(shape, dtype=torch.int32).scatter_add_(1, index, torch.ones_like(buckets))
        counts = counts.flip(1).cumsum(1)
    rows = zip(probabilities.numpy(), buckets.numpy(), mass.numpy(), counts.numpy(), strict=True)
    found = [_Ranking(*row).draw(p, number) for row, p, number in zip(rows, params, uniforms, strict=True)]
    chosen = torch.tensor([-1 if token_id is None else token_id for token_id in found])
    doubted = [row for row, token_id in enumerate(found) if token_id is None]
    if doubted:
        chosen[doubted] = _draw_sorted(
            _rows(probabilities, doubted), [params[row] for row in doubted], [uniforms[row] for row in doubted]
        )
    return chosen


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
        self._looked_into: dict[int, tuple[NDArray[np.float32], NDArray[np.float64]]] = {}

    def draw(self, params: SamplingParams, number: float) -> int | None:
        """A token id by one number in [0, 1); None when in doubt."""
        total = self._mass_of_likely(params)
        if params.top_p == 1.0:
            return self._draw_within(number, total, total)
        top_p = float(np.float32(params.top_p))
        # Which token is the last one kept is seldom asked for: it moves the bounds by its own probability.
        low, high = max(0.0, (top_p - _DOUBT) * total), (top_p + _DOUBT) * total
        token_id = self._draw_within(number, low, min(high + self._most_at(high), total))
        return self._draw_within(number, *self._mass_up_to(top_p, total)) if token_id is None else token_id

    def _draw_within(self, number: float, low: float, high: float) -> int | None:
        """The token of a number in [0, 1), where the tokens that are kept have a mass from `low` to `high`."""
        at = self._look(number * low)
        if at is None:
            return None
        value, before, after, rank = at
        is_certain = before <= number * low * (1 - _DOUBLE_DOUBT) and number * high * (1 + _DOUBLE_DOUBT) < after
        if not is_certain:
            return None
        alike = self._probabilities == value
        return int(alike.argmax() if rank == 0 else alike.nonzero()[0][rank])

    def _mass_of_likely(self, params: SamplingParams) -> float:
        """Of what top_k and min_p leave, at least the first."""
        place = _NUM_BUCKETS - 1  # the last of which anything is left
        if params.min_p > 0.0:
            floor = np.float32(params.min_p) * self._probabilities.max()
            place -= int(floor.view(np.int32) >> _DROPPED_BITS)
        has_top_k = 0 < params.top_k < len(self._probabilities)
        if has_top_k:
            place = min(place, int(self._counts.searchsorted(params.top_k)))
        before = place - 1
        if place == _NUM_BUCKETS - 1 or self._mass[place] == self._mass[before]:
            return float(self._mass[place])  # a bucket of zeros may hold most of a vocabulary
        probabilities, running = self._bucket(place)
        num_left = len(probabilities)
        if params.min_p > 0.0:
            num_left = int(np.count_nonzero(probabilities >= floor))
        if has_top_k:
            num_left = min(num_left, params.top_k - int(self._counts[before]))
        return float(running[num_left])

    def _mass_up_to(self, top_p: float, total: float) -> tuple[float, float]:
        """At least and at most what the tokens have that are kept of a `total`."""
        at = self._look(top_p * total)
        if at is None:
            return (top_p - _DOUBT) * total, total
        _, before, after, _ = at
        is_kept = before == 0.0 or before < (top_p - _DOUBT) * total  # the most likely one always is
        if is_kept and (top_p + _DOUBT) * total <= after:
            return after, after
        return (top_p - _DOUBT) * total, min((top_p + _DOUBT) * total + after - before, total)

    def _most_at(self, mass: float) -> float:
        """No token has more where the running sum passes `mass`, or later."""
        place = int(self._mass.searchsorted(mass, side="right"))
        return float(np.int32((_NUM_BUCKETS - place) << _DROPPED_BITS).view(np.float32))

    def _look(self, mass: float) -> tuple[np.float32, float, float, int] | None:
        """Of the token where the running sum passes `mass`: its probability, the sums before and after it, and how
        many as likely ones come before it."""
        place = int(self._mass.searchsorted(mass, side="right"))
        if place == _NUM_BUCKETS:
            return None
        probabilities, running = self._bucket(place)
        index = int(running.searchsorted(mass, side="right")) - 1
        if not 0 <= index < len(probabilities):  # between two sums of the same in different order
            return None
        value = probabilities[index]
        rank = index - int(np.count_nonzero(probabilities > value))
        return value, float(running[index]), float(running[index + 1]), rank

    def _bucket(self, place: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The probabilities in a bucket from the highest down, and the running sum before the first and after each."""
        if place not in self._looked_into:
            probabilities = self._probabilities[self._buckets == _NUM_BUCKETS - 1 - place]
            probabilities.sort()
            running = np.empty(len(probabilities) + 1)
            running[0] = self._mass[place - 1] if place else 0.0
            running[1:] = probabilities[::-1]
            self._looked_into[place] = probabilities[::-1], running.cumsum()
        return self._looked_into[place]


def _draw_sorted(probabilities: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Token ids [B] by the ranking of each row: what the buckets stand for."""
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
    if probabilities.is_cuda:
        return probabilities.sort(dim=-1, descending=True).values
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
    if weights.is_cuda:
        return _invert_whole(weights, numbers)
    columns, is_certain = _invert_by_blocks(weights, numbers)
    if not is_certain.all():
        doubted = ~is_certain
        columns[doubted] = _invert_whole(weights[doubted], numbers[doubted])
    return columns


def _invert_by_blocks(weights: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [B], and whether they are certainly those of the whole sums: one after the other these take long."""
    num_rows, width = weights.shape
    num_blocks = width // _BLOCK
    whole = weights[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK))
    sums = torch.zeros(num_rows, num_blocks + 2, dtype=torch.float64)
    sums[:, 1:-1] = whole.sum(dim=-1, dtype=torch.float64)
    sums[:, -1] = weights[:, num_blocks * _BLOCK :].sum(dim=-1, dtype=torch.float64)
    sums = sums.cumsum_(dim=-1)  # before each block, and of all
    targets = numbers * sums[:, -1:]
    blocks = (torch.searchsorted(sums, targets, right=True) - 1).clamp_(0, num_blocks)
    columns = blocks * _BLOCK + torch.arange(_BLOCK)  # [B, block]
    inside = weights.gather(1, columns.clamp(max=width - 1)) * (columns < width)
    running = torch.cat([sums.gather(1, blocks), inside.double()], dim=1).cumsum_(dim=-1)  # [B, 1 + block]
    places = (torch.searchsorted(running, targets, right=True) - 1).clamp_(0, _BLOCK - 1)
    before, after = running.gather(1, places), running.gather(1, places + 1)
    is_certain = (before <= targets * (1 - _DOUBLE_DOUBT)) & (targets * (1 + _DOUBLE_DOUBT) < after)
    return (blocks * _BLOCK + places)[:, 0], is_certain[:, 0]


def _invert_whole(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    cumulative = weights.double().cumsum_(dim=-1)
    columns = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]  # [B]
    past = (columns == weights.shape[1]).nonzero()[:, 0]  # rounded up to the total
    if len(past):
        columns[past] = (weights[past] > 0).cumsum(dim=-1).argmax(dim=-1)
    return columns
