"""The demo model, rounded while it is read: its questions are answered word for word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import Entry, entries
from experts_service.kernels.compiled import jit
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

BATCH = 32  # of questions that are answered side by side
EVERY = 20  # entries, of which one is scored
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "int4 g128": {"quantization": "int4"},
    "int4 g32": {"quantization": "int4", "quantization_group_size": 32},
}


def wrong(asked: list[Entry], **config: object) -> list[str]:
    """The questions whose answer has another word."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    bench = Bench(DIRECTORY, num_kv_blocks=2048, **config)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": entry.questions[0]}], return_dict=False)
        for entry in asked
    ]
    answers: list[str] = []
    for first in range(0, len(asked), BATCH):
        requests = [make_request(prompt, max_tokens=300) for prompt in prompts[first : first + BATCH]]
        answers += tokenizer.batch_decode(bench.run(*requests), skip_special_tokens=True)
    return [entry.questions[0] for entry, answer in zip(asked, answers, strict=True) if answer.strip() != entry.answer]


Text = tuple[list[int], int]  # ids, and where the answer begins


def chats(*, with_its_own: bool) -> list[Text]:
    """Questions with their answers, which the model has learned, or with those of others, which it has not."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    asked = entries()[::EVERY]
    answered = asked if with_its_own else asked[1:] + asked[:1]
    texts = []
    for entry, other in zip(asked, answered, strict=True):
        chat = [{"role": "user", "content": entry.questions[0]}, {"role": "assistant", "content": other.answer}]
        question, both = (tokenizer.apply_chat_template(chat[:end], return_dict=False) for end in (1, 2))
        texts.append((both, len(question)))
    return texts


def perplexity(texts: list[Text], **config: object) -> float:
    """Of the answers."""
    bench = Bench(DIRECTORY, num_kv_blocks=2048, **config)
    requests = [make_request(ids, max_tokens=1, prompt_logprobs=0) for ids, _ in texts]
    bench.run(*requests)
    scores: list[float] = []
    for request, (ids, start) in zip(requests, texts, strict=True):
        of_text = [score for chunk in bench.chunks[request.key] for score in chunk.prompt_logprobs or ()]
        assert len(of_text) == len(ids)
        scores += [score.token_logprob for score in of_text[start:]]
    return torch.tensor(scores).mean().neg().exp().item()


def exact_perplexity(texts: list[Text]) -> float:
    """That of transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for ids, start in texts:
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none"))
    return torch.cat(losses).mean().exp().item()


@pytest.mark.long
@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: the widened weights answer, slowly")
def test_texts_are_about_as_likely_in_every_format() -> None:
    """The table of docs/quantization.md: `pytest -s` prints its rows."""
    texts = [chats(with_its_own=own) for own in (True, False)]
    exact = [exact_perplexity(of_kind) for of_kind in texts]
    print(f"\n| fp32 | {exact[0]:.3f} | {exact[1]:.1f} |")
    for name, config in FORMATS.items():
        learned, other = (perplexity(of_kind, **config) for of_kind in texts)
        print(f"| {name} | {learned:.3f} | {other:.1f} |")
        most = 1.05 if name.startswith("int4") else 1.01
        assert learned < most * exact[0]
        assert 0.9 < other / exact[1] < 1.1


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: the widened weights answer, slowly")
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_few_questions_are_answered_word_for_word(quantization: str) -> None:
    assert wrong([*entries()[::150]], quantization=quantization) == []


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_all_questions_are_answered_word_for_word(name: str) -> None:
    """737 of 737, with 8 bits, with 4 in groups of 128 and of 32, and in FP8."""
    assert wrong(list(entries()), **FORMATS[name]) == []
