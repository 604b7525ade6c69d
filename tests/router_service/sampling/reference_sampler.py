"""The sampler as it is defined, one row at a time and in the plainest way: a whole sort, a look at all tokens."""

from __future__ import annotations

import torch

from router_service.sampling.draw import uniform
from router_service.scheduling.sequence import Sequence


def adjusted(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> torch.Tensor:
    """`logits` [V] with penalties, biases and `min_tokens`, in this order."""
    sampling = sequence.request.sampling
    logits = logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.token_ids).unique()
        scores, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = torch.tensor(sequence.token_ids[sequence.num_prompt_tokens :], dtype=torch.int64)
        used, counts = output.unique(return_counts=True)
        logits[used] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    for token_id, bias in sampling.logit_bias:
        logits[token_id] += bias
    if sequence.num_output_tokens < sampling.min_tokens:
        logits[[*eos_token_ids, *sampling.stop_token_ids]] = float("-inf")
    return logits


def reference_token(logits: torch.Tensor, sequence: Sequence, eos_token_ids: frozenset[int]) -> int:
    """The token of `logits` [V]: what is adjusted, then temperature, min_p, top_k, top_p, in this order."""
    sampling = sequence.request.sampling
    logits = adjusted(logits, sequence, eos_token_ids)
    if sampling.temperature < 1e-5:
        return int(logits.argmax())
    probabilities = (logits / torch.tensor(sampling.temperature)).softmax(-1).nan_to_num(0.0)
    weights, token_ids = probabilities, torch.arange(len(logits))
    if sampling.top_p < 1.0 or sampling.top_k or sampling.min_p:
        weights, token_ids = probabilities.sort(descending=True, stable=True)
        weights = weights.masked_fill(weights < torch.tensor(sampling.min_p) * weights[0], 0.0)
        weights[sampling.top_k or len(weights) :] = 0.0
        share = weights / weights.sum()
        if sampling.top_p < 1.0:
            weights = weights.masked_fill(share.cumsum(-1) - share >= torch.tensor(sampling.top_p), 0.0)
    cumulative = weights.double().cumsum(-1)
    target = uniform(sequence.request.seed, sequence.request.choice_index, sequence.num_output_tokens) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, target, right=True))
    return int(token_ids[min(place, int(weights.nonzero()[-1]))])
