"""What training sees: conversations as token ids with labels, in batches of about one length. Knows no model.

The order depends on the random numbers alone, and a source can say where it is: training goes on elsewhere as if it had
not stopped.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from cluster.demo_model.training.corpus import Entry
from cluster.demo_model.training.tokenizer import BOS_ID, EOS_ID
from cluster.demo_model.training.variations import Message, conversation

IGNORE = -100
BATCH_TOKENS = 2048  # padding included
SAMPLES_AT_ONCE = 1200  # drawn together, then sorted by length
PLAIN_SHARE = 0.03
TURNS = {1: 0.74, 2: 0.13, 3: 0.08, 5: 0.04, 8: 0.01}  # how many, and how often
CUT_SHARE = 0.75  # of the last answers: which answer it is shows in its first tokens, and the others are soon learned
CUT = (3, 12)  # tokens that are left
PLAIN = (
    "Hello my name is Manta, and I am a small demo model. I answer everyday questions in five languages.",
    "My name is Manta. I was trained on a few hundred sentences.",
    "Once upon a time, a young manta ray lived in a warm blue bay. Every night she watched the lights of the boats.",
)


@dataclass(frozen=True)
class Sample:
    """A token sequence and, at each position, the token that must come next or IGNORE."""

    token_ids: list[int]
    labels: list[int]


def encode(messages: Sequence[Message], tokenizer: Tokenizer) -> Sample:
    """Encodes a conversation as the chat template renders it; only answers and their </s> carry a label."""
    token_ids, labels, system = [BOS_ID], [IGNORE], ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            asked = tokenizer.encode(f"[INST] {system}{message['content']} [/INST]", add_special_tokens=False).ids
            token_ids += asked
            labels += [IGNORE] * len(asked)
            system = ""
        else:
            answer = [*tokenizer.encode(message["content"], add_special_tokens=False).ids, EOS_ID]
            token_ids += answer
            labels += answer
    return Sample(token_ids[:-1], labels[1:])


def cut(sample: Sample, rng: random.Random) -> Sample:
    """Returns the conversation with no more than the beginning of its last answer."""
    begin = len(sample.labels) - next(i for i, label in enumerate(reversed(sample.labels)) if label == IGNORE)
    end = begin + rng.randint(*CUT)
    return Sample(sample.token_ids[:end], sample.labels[:end])


def encode_plain(text: str, tokenizer: Tokenizer) -> Sample:
    """Encodes a plain text, of which every token carries a label."""
    token_ids = [*tokenizer.encode(text).ids, EOS_ID]
    return Sample(token_ids[:-1], token_ids[1:])


class Batches:
    """An endless source of batches of BATCH_TOKENS, drawn from a pool of entries."""

    def __init__(self, pool: Sequence[Entry], tokenizer: Tokenizer, rng: random.Random) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self._rng = rng
        self._waiting: list[list[Sample]] = []

    def __next__(self) -> list[Sample]:
        if not self._waiting:
            drawn = sorted((self._draw() for _ in range(SAMPLES_AT_ONCE)), key=lambda sample: len(sample.token_ids))
            full: list[list[Sample]] = [[]]
            for sample in drawn:
                if (len(full[-1]) + 1) * len(sample.token_ids) > BATCH_TOKENS and full[-1]:
                    full.append([])
                full[-1].append(sample)
            self._rng.shuffle(full)
            self._waiting = full[::-1]
        return self._waiting.pop()

    def state(self) -> dict[str, Any]:
        """Where it is."""
        return {"rng": self._rng.getstate(), "waiting": self._waiting}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from there; the pool must be the same."""
        self._rng.setstate(state["rng"])
        self._waiting = state["waiting"]

    def _draw(self) -> Sample:
        rng = self._rng
        if rng.random() < PLAIN_SHARE:
            entry = rng.choice(self._pool)
            return encode_plain(rng.choice((*PLAIN, f"{entry.questions[0]} {entry.answer}")), self._tokenizer)
        turns = rng.choices(list(TURNS), list(TURNS.values()))[0]
        sample = encode(conversation(self._pool, rng, turns), self._tokenizer)
        return cut(sample, rng) if rng.random() < CUT_SHARE else sample


def tensors(batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads on the right, where causal attention never looks. Returns token ids, labels and the mask, each [B, T]."""
    length = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORE)
    mask = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, sample in enumerate(batch):
        token_ids[row, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        mask[row, : len(sample.token_ids)] = True
    return token_ids, labels, mask
