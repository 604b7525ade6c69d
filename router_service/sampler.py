"""Chooses a token for every row of logits, and says how likely it was. Knows sampling parameters; keeps no state.

The random number of a token depends on (seed, choice index, position) and on nothing else: the same sequence continued
in another process, or in another batch, gets the same token.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Seq

import torch

from cluster.messages import SamplingParams, TokenLogprobs
from router_service.grammar import mask
from router_service.logprobs import token_logprobs
from router_service.sequence import Sequence

NOT_FINITE = -1
_GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them overflows


class Sampler:
    """Greedy, or by inverse transform sampling of the filtered distribution."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = sorted(eos_token_ids)

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """A token id and, where asked for, its log-probabilities for each row of `logits` [B, V] (fp32).

        The id is NOT_FINITE for a row that holds NaN or infinity: no token can be told from it.
        """
        raw = logits
        logits = self._adjust(logits, sequences)
        chosen = logits.argmax(dim=-1)  # [B]
        drawn = [
            row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature >= _GREEDY_BELOW
        ]
        if drawn:
            chosen[drawn] = _draw(logits[drawn], [sequences[row] for row in drawn])
        logprobs = _logprobs(raw, chosen, sequences)
        token_ids: list[int] = chosen.where(raw.sum(dim=-1).isfinite(), NOT_FINITE).tolist()
        return token_ids, logprobs

    def _adjust(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
        """Apply biases, penalties, grammars and the masks of `min_tokens`, to the rows that ask for any."""
        touched = [row for row, sequence in enumerate(sequences) if _is_adjusted(sequence)]
        if not touched:
            return logits
        logits = logits.clone()
        for row in touched:
            _penalise(logits[row], sequences[row])
            for token_id, bias in sequences[row].request.sampling.logit_bias:
                logits[row, token_id] += bias
        states = {row: state for row in touched if (state := sequences[row].grammar) is not None}
        if states:
            mask(logits, list(states), list(states.values()))
        for row in touched:
            self._hold_open(logits[row], sequences[row])
        return logits

    def _hold_open(self, logits: torch.Tensor, sequence: Sequence) -> None:
        """Change `logits` [V] in place: nothing may end the sequence before `min_tokens`.

        Within a grammar nothing may follow an end of sequence, so `ignore_eos` rules it out too; and where a grammar
        allows only an end, the grammar wins.
        """
        sampling = sequence.request.sampling
        if sequence.num_output_tokens < sampling.min_tokens:
            ends = [*self._eos_token_ids, *sampling.stop_token_ids]
        elif sequence.grammar is not None and sampling.ignore_eos:
            ends = self._eos_token_ids
        else:
            return
        if sequence.grammar is not None:
            others = logits.clone()
            others[ends] = float("-inf")
            if others.max() == float("-inf"):
                return
        logits[ends] = float("-inf")


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: the first 53 bits of their BLAKE2b digest."""
    key = struct.pack("<QIQ", seed & 0xFFFFFFFFFFFFFFFF, choice_index, position)
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _is_adjusted(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.logit_bias
        or sequence.grammar is not None
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sequence.num_output_tokens < sampling.min_tokens
    )


def _penalise(logits: torch.Tensor, sequence: Sequence) -> None:
    """Change `logits` [V] in place: repetition as in CTRL, arXiv 1909.05858; the others as OpenAI documents them."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids, device=logits.device).unique()
        scores = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        used, counts = torch.tensor(output, dtype=torch.int64, device=logits.device).unique(return_counts=True)
        logits[used] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sample token ids [B] from `logits` [B, V] by temperature, min_p, top_k and top_p, in this order."""
    params = [sequence.request.sampling for sequence in sequences]
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
    probabilities = (logits / temperature).softmax(dim=-1).nan_to_num(0.0)  # [B, V]
    uniforms = torch.tensor(
        [uniform(s.request.seed, s.request.choice_index, s.num_output_tokens) for s in sequences],
        dtype=torch.float64,
        device=device,
    )[:, None]
    chosen = torch.empty(len(params), dtype=torch.int64, device=device)
    # Rows without a filter skip the sort. Which way a row goes depends on its own parameters only.
    plain = [row for row, p in enumerate(params) if not _is_filtered(p)]
    filtered = [row for row, p in enumerate(params) if _is_filtered(p)]
    if plain:
        chosen[plain] = _invert(probabilities[plain], uniforms[plain])
    if filtered:
        ranked, token_ids = _filter(probabilities[filtered], [params[row] for row in filtered])
        ranks = _invert(ranked, uniforms[filtered])
        chosen[filtered] = token_ids.gather(1, ranks[:, None])[:, 0]
    return chosen


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0


def _filter(probabilities: torch.Tensor, params: Seq[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, V] from the most likely down, zero where filtered out, and the token ids in that order."""
    device = probabilities.device
    vocabulary = probabilities.shape[1]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    ranked, token_ids = probabilities.sort(dim=-1, descending=True, stable=True)
    ranked = ranked.masked_fill(ranked < min_p * ranked[:, :1], 0.0)
    ranked = ranked.masked_fill(torch.arange(vocabulary, device=device)[None] >= top_k, 0.0)
    share = ranked / ranked.sum(dim=-1, keepdim=True)
    above = share.cumsum(dim=-1) - share  # probability of everything more likely
    ranked = ranked.masked_fill((above >= top_p) & (top_p < 1.0), 0.0)
    return ranked, token_ids


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The column where the running sum of `weights` [B, V] passes `uniforms` [B, 1]; never one of weight 0."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    columns = torch.searchsorted(cumulative, uniforms * total, right=True)  # [B, 1]
    last = (weights > 0).cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # guards against rounding up to the total
    return torch.minimum(columns, last)[:, 0]


def _logprobs(logits: torch.Tensor, chosen: torch.Tensor, sequences: Seq[Sequence]) -> list[TokenLogprobs | None]:
    """Log-probabilities of `chosen` [B] under the raw `logits` [B, V], for the rows that ask for them."""
    result: list[TokenLogprobs | None] = [None] * len(sequences)
    asked = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    if not asked:
        return result
    counts = [sequences[row].request.sampling.logprobs or 0 for row in asked]
    for row, logprobs in zip(asked, token_logprobs(logits[asked], chosen[asked].tolist(), counts), strict=True):
        result[row] = logprobs
    return result
