"""Every native family against transformers, on the same random weights: in chunks, from the cache, in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.checkpoint.families import FAMILIES
from experts_service.kernels.compiled import jit
from tests.families import CONFIGS, MODEL_TYPES, random_model, write_model
from tests.router_service.engine.test_engine import logits_of, prompt, reference_ids
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

NUM_TOKENS = 64


def test_every_family_is_tried() -> None:
    tried = {MODEL_TYPES.get(name, name) for name in CONFIGS}
    assert tried | {"mixtral", "mistral"} == set(FAMILIES)  # those two: test_engine.py


@pytest.mark.parametrize("name", CONFIGS)
def test_its_logits_and_64_greedy_tokens_are_those_of_transformers(tmp_path: Path, name: str, device: str) -> None:
    model = random_model(name).to(device)
    write_model(tmp_path, model)
    ids = prompt(40)
    with torch.inference_mode():
        expected = model(torch.tensor([ids], device=device)).logits[0, -1]
    torch.testing.assert_close(logits_of(Bench(tmp_path, device=device), ids), expected, atol=1e-4, rtol=0)
    tokens = reference_ids(model, ids, NUM_TOKENS)
    assert len(set(tokens)) >= 8, "a model that says the same all the time would not tell"
    write_model(tmp_path / "fused", model, "fused")
    groups = 4 if "num_experts_per_tok" in CONFIGS[name] else 1
    bench = Bench(tmp_path / "fused", max_num_batched_tokens=17, num_groups=groups, device=device)
    first, again = (make_request(ids, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, ignore_eos=True) for _ in range(2))
    assert bench.one_by_one(first, again) == [tokens, tokens]
    assert bench.engine.stats().prefix_cache_hit_tokens_total > 0


def test_of_600_experts_its_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """They are numbered in more than one byte."""
    model = random_model("qwen3_moe", num_experts=600, moe_intermediate_size=16)
    write_model(tmp_path, model)
    request = make_request(
        prompt(40), max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, ignore_eos=True, routed_experts=True
    )
    bench = Bench(tmp_path, num_groups=4)
    assert bench.run(request) == [reference_ids(model, prompt(40), NUM_TOKENS)]
    told = np.frombuffer(b"".join(chunk.routed_experts for chunk in bench.chunks[request.key]), np.uint16)
    assert 256 <= told.max() < 600


@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_its_tokens_are_the_same_alone_and_in_a_batch(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 64, "head_dim": 32} if "head_dim" in CONFIGS[name] else {"hidden_size": 128}
    groups = 4 if "num_experts_per_tok" in CONFIGS[name] else 1
    model = random_model(name, vocab_size=300, **sizes).bfloat16()
    write_model(tmp_path, model)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt(40)])).logits[0, -1].float()
    ours = logits_of(Bench(tmp_path), prompt(40))
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.99, "rounded in other places, and no more"
    requests = [make_request(prompt(3 + 7 * i, seed=i), max_tokens=16, ignore_eos=True) for i in range(6)]
    alone = Bench(tmp_path, prefix_caching=False).one_by_one(*requests)
    assert [len(tokens) for tokens in alone] == 6 * [16]
    together = [make_request(request.prompt_token_ids, max_tokens=16, ignore_eos=True) for request in requests]
    assert Bench(tmp_path, prefix_caching=False, max_num_batched_tokens=40, num_groups=groups).run(*together) == alone
