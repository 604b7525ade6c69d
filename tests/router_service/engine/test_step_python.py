"""What a step costs beside the model: it may not grow with the contexts of the sequences that decode."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from router_service.engine import Engine
from router_service.model.model_runner import StepOutput
from router_service.sampling.sampler import Sampler
from router_service.scheduling.block_manager import BlockManager
from router_service.scheduling.scheduler import Scheduler
from router_service.scheduling.sequence import Sequence
from tests.router_service.requests import make_request

VOCABULARY = 64
NUM_SEQS = 8
NUM_STEPS = 60


class NoModel:
    """A runner that computes nothing: every token is 0."""

    def __init__(self):
        architecture, device = SimpleNamespace(vocab_size=VOCABULARY), torch.device("cpu")
        self.decoder = SimpleNamespace(architecture=architecture, device=device)

    def forward(self, batch):
        return StepOutput(torch.zeros(sum(one.samples for one in batch), VOCABULARY), list)


def decoding_engine(context, **sampling):
    """An engine whose sequences have this context and decode."""
    scheduler = Scheduler(
        BlockManager(2 * NUM_SEQS * (context + NUM_STEPS) // 4, block_size=4),
        max_num_seqs=NUM_SEQS + 1,
        max_num_batched_tokens=2**40,
        max_model_len=context + NUM_STEPS,
        eos_token_ids=frozenset({1}),
    )
    engine = Engine(scheduler, NoModel(), Sampler(frozenset({1})), lambda events: None, max_waiting=NUM_SEQS)
    for first in range(NUM_SEQS):
        prompt = [first + 2] + [5] * (context - 1)
        engine._add(Sequence(make_request(prompt, max_tokens=2**40, ignore_eos=True, **sampling)))
    for _ in range(3):
        engine.step()
    assert all(len(sequence) == context + 3 for sequence in scheduler.running)
    return engine


def step_s(engine):
    started = time.thread_time()
    engine.step()
    return time.thread_time() - started


@pytest.mark.parametrize("sampling", [{}, {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 2}])
@pytest.mark.parametrize("is_doubted", [False, True])
def test_it_does_not_grow_with_the_context(sampling, is_doubted):
    """While blocks were in doubt somewhere each step looked through the block tables of all sequences."""
    short, long = (decoding_engine(context, **sampling) for context in (64, 16_384))
    for engine in (short, long):
        if is_doubted:
            running, blocks = engine.scheduler.running, engine.scheduler.block_manager
            blocks.doubt(running[0].block_table[-1:])
    times = [(step_s(short), step_s(long)) for _ in range(40)]
    assert min(of_long for _, of_long in times) < 2 * min(of_short for of_short, _ in times)
