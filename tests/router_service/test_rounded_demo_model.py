"""The demo model, rounded while it is read: its questions are answered word for word."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import Entry, entries
from experts_service.kernels import jit
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

BATCH = 32  # of questions that are answered side by side


def wrong(quantization: str, asked: list[Entry], **config: object) -> list[str]:
    """The questions whose answer has another word."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    bench = Bench(DIRECTORY, num_kv_blocks=2048, quantization=quantization, **config)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": entry.questions[0]}], return_dict=False)
        for entry in asked
    ]
    answers: list[str] = []
    for first in range(0, len(asked), BATCH):
        requests = [make_request(prompt, max_tokens=300) for prompt in prompts[first : first + BATCH]]
        answers += tokenizer.batch_decode(bench.run(*requests), skip_special_tokens=True)
    return [entry.questions[0] for entry, answer in zip(asked, answers, strict=True) if answer.strip() != entry.answer]


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: the widened weights answer, slowly")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_few_questions_are_answered_word_for_word(quantization: str) -> None:
    assert wrong(quantization, [*entries()[::150]]) == []


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_all_questions_are_answered_word_for_word(quantization: str) -> None:
    """737 of 737, with 8 bits and with 4 in groups of 128."""
    assert wrong(quantization, list(entries())) == []
