"""The sampler against transformers' logits processors, and its random numbers against themselves."""

import collections

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from router_service.sampler import Sampler, uniform
from tests.router_service.requests import make_sequence

VOCABULARY = 50
EOS = 2


def logits(seed=0):
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def draws(row, count=3000, **sampling):
    """How often each token is drawn from one row of logits, over as many seeds."""
    sequences = [make_sequence([1, 2, 3], seed=seed, **sampling) for seed in range(count)]
    token_ids, _ = Sampler(frozenset({EOS}))(row.expand(count, -1), sequences)
    return collections.Counter(token_ids)


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"temperature": 1.5, "top_p": 0.9}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.9)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 1.0, "top_k": 8, "top_p": 0.7}, [TopKLogitsWarper(8), TopPLogitsWarper(0.7)]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_the_reference(sampling, warpers, device):
    row = logits()
    expected = LogitsProcessorList(warpers)(torch.tensor([[1, 2, 3]]), row.clone()).softmax(-1)[0]
    drawn = draws(row.to(device), **sampling)
    assert all(expected[token] > 0 for token in drawn), "a token that the reference filters out was drawn"
    for token in range(VOCABULARY):
        # Five standard deviations of a binomial, and a little for the rarest.
        spread = 5 * (3000 * expected[token] * (1 - expected[token])).sqrt() + 1
        assert abs(drawn[token] - 3000 * expected[token]) <= spread


def test_repetition_penalty_is_the_reference_one():
    row = logits()
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 3, 7]]), row.clone()).argmax(-1)
    sequence = make_sequence([1, 2, 3, 3], output=[7], repetition_penalty=1.7)
    assert Sampler(frozenset())(row, [sequence])[0] == expected.tolist()


def test_presence_and_frequency_penalties_count_output_tokens_only():
    row = torch.zeros(1, 4)
    row[0] = torch.tensor([1.0, 0.9, 0.8, 0.0])
    sampler = Sampler(frozenset())
    assert sampler(row, [make_sequence([0, 0, 0], presence_penalty=2.0)])[0] == [0]
    assert sampler(row, [make_sequence([3], output=[0], presence_penalty=0.15)])[0] == [1]
    assert sampler(row, [make_sequence([3], output=[0, 0, 1], frequency_penalty=0.2)])[0] == [2]


def test_bias_and_minimum_length():
    row = torch.zeros(1, 4)
    row[0, EOS] = 5.0
    sampler = Sampler(frozenset({EOS}))
    assert sampler(row, [make_sequence([1])])[0] == [EOS]
    assert sampler(row, [make_sequence([1], min_tokens=1, logit_bias=((3, 1.0),))])[0] == [3]
    assert sampler(row, [make_sequence([1], output=[0], min_tokens=1)])[0] == [EOS]


def test_a_row_does_not_depend_on_its_neighbours():
    rows = torch.cat([logits(seed) for seed in range(12)])
    ways = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"presence_penalty": 1.0}]
    sequences = [make_sequence([1], output=[4], seed=i, logprobs=2, **ways[i % 4]) for i in range(12)]
    sampler = Sampler(frozenset({EOS}))
    together = sampler(rows, sequences)
    alone = [sampler(rows[i : i + 1], sequences[i : i + 1]) for i in range(12)]
    assert together[0] == [tokens[0] for tokens, _ in alone]


def test_uniform_is_fixed_for_ever_and_depends_on_all_its_arguments():
    """A change of these numbers would change what resumed sequences get: it needs a new major version."""
    assert uniform(0, 0, 0) == uniform(0, 0, 0)
    values = {uniform(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 3, 5)]}
    assert len(values) == 5
    assert all(0 <= value < 1 for value in values)
    assert uniform(42, 1, 7) == pytest.approx(UNIFORM_42_1_7, abs=0)


UNIFORM_42_1_7 = 0.3599493854321577
