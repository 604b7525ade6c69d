"""Quantised checkpoints of other families, named as the hub names them, against transformers with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from tests.families import random_model
from tests.quantized_checkpoints import awq, compressed_tensors, fine_grained_fp8, gptq, write_quantized_family
from tests.router_service.engine.test_engine import prompt, reference_ids
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

NUM_TOKENS = 12
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FORMATS = {
    "awq": awq(),
    "compressed-tensors": compressed_tensors("pack-quantized", INT4),
    "fp8-blocks": fine_grained_fp8((32, 32)),
    "gptq": gptq(),
}
OTHERS = [form for form in FORMATS if form != "gptq"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
OWN = {
    "llama": {},
    "olmoe": {},
    "qwen2": {},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": []},
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("form", ["gptq", *(pytest.param(form, marks=pytest.mark.long) for form in OTHERS)])
def test_greedy_tokens_are_those_of_what_the_numbers_stand_for(tmp_path: Path, name: str, form: str) -> None:
    model = write_quantized_family(tmp_path, FORMATS[form], random_model(name, **SIZES, **OWN[name]))
    tensors = open_checkpoint(tmp_path).tensors
    plain = ("norm.weight", "gate.weight", ".bias", "embed_tokens.weight", "lm_head.weight")
    assert {of for of, ref in tensors.items() if not isinstance(ref, QuantizedRef)} == {
        of for of in tensors if of.endswith(plain)
    }
    request = make_request(prompt(20), max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, ignore_eos=True)
    with torch.inference_mode():
        assert Bench(tmp_path).run(request) == [reference_ids(model, prompt(20), NUM_TOKENS)]
