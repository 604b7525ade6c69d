"""Long prompts get the ids of transformers in fp32, whatever attention reads: all of a context, or a window of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests.checkpoints import CausalLM, write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

NUM_NEW = 12
CHUNK = 1024  # of the reference, whose masks are this times the context
BLOCK_SIZE = 16


def reference_ids(model: CausalLM, prompt: list[int]) -> list[int]:
    """Greedy ids after a prompt that transformers is given in chunks."""
    cache = DynamicCache(config=model.config)
    ids: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(prompt), CHUNK):
            logits = model(
                torch.tensor([prompt[start : start + CHUNK]]), past_key_values=cache, logits_to_keep=1
            ).logits
        while len(ids) < NUM_NEW:
            ids.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits
    return ids


@pytest.mark.parametrize(
    ("length", "window", "is_dense"),
    [
        (8191, None, False),
        (8191, 1000, True),
        pytest.param(8191, 5000, False, marks=pytest.mark.long),
        pytest.param(32_700, None, False, marks=pytest.mark.long),
        pytest.param(32_700, 4096, True, marks=pytest.mark.long),
        pytest.param(32_700, 17, False, marks=pytest.mark.long),
    ],
)
def test_greedy_ids_are_those_of_transformers(tmp_path: Path, length: int, window: int | None, is_dense: bool) -> None:
    model = write_checkpoint(
        tmp_path,
        dense=is_dense,
        sliding_window=window,
        max_position_embeddings=32_768,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    prompt = random.Random(length).choices(range(3, 90), k=length)
    bench = Bench(
        tmp_path,
        num_kv_blocks=2 * (32_768 // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=32_768,
        num_threads=2,
    )
    request = make_request(prompt, max_tokens=NUM_NEW, min_tokens=NUM_NEW, ignore_eos=True)
    ids = reference_ids(model, prompt)
    assert bench.run(request) == [ids]
    assert len(set(ids)) > 2, "a model that says one thing tells nothing"
    # Once more, from the prefix cache: what is read there was computed in other steps.
    again = make_request(prompt, max_tokens=NUM_NEW, min_tokens=NUM_NEW, ignore_eos=True)
    assert bench.run(again) == [ids]
