"""Matrices that are rounded while they are read: how close they stay, which they are, and what tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.rounding import Numbers, Rounding
from cluster.checkpoint.quantization.scheme import Packed, Values
from cluster.config import EngineConfig
from cluster.errors import ConfigError
from cluster.planning.weights import held_weights
from experts_service.quantization.rounding import rounded
from experts_service.quantization.weight import QuantizedWeight
from experts_service.weights import read_tensors
from tests.checkpoints import write_checkpoint
from tests.quantized_checkpoints import gptq, write_quantized

Q, W1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.block_sparse_moe.experts.0.w1.weight"
PLAIN = ["model.layers.0.block_sparse_moe.gate.weight", "model.embed_tokens.weight"]
HEAD = "lm_head.weight"


def to(numbers: Numbers, group_size: int = 32) -> Packed | Values:
    return Rounding.to(numbers, group_size, "all").scheme


def error(weight: torch.Tensor, scheme: Packed | Values) -> float:
    """Of the rounded matrix, as a part of the matrix's norm."""
    difference = rounded(weight, scheme, torch.float32).dequantize(torch.float32) - weight
    return (difference.norm() / weight.norm()).item()


@pytest.mark.parametrize(
    ("numbers", "group_size", "most"),
    [("int8", 32, 0.006), ("int8", 128, 0.007), ("int4", 32, 0.085), ("int4", 128, 0.0985), ("fp8", 128, 0.027)],
)
def test_weights_are_rounded_as_closely_as_is_promised(numbers: Numbers, group_size: int, most: float) -> None:
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert most * 0.8 < error(weight, to(numbers, group_size)) < most


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_what_kernels_hold(bits: int) -> None:
    """Scales are numbers of bf16, codes fit their bits, a group of zeros stays zeros, the last group may be short."""
    weight = torch.randn(70, 100, generator=torch.Generator().manual_seed(1))
    weight[3, 32:64] = 0
    small = rounded(weight.bfloat16(), to("int8" if bits == 8 else "int4"), torch.bfloat16)
    assert torch.equal(small.scales, small.scales.bfloat16().float())
    assert small.scales.shape == (70, 4)
    assert -(2 ** (bits - 1)) <= small.codes.min().item() <= small.codes.max().item() < 2 ** (bits - 1)
    widened = small.dequantize(torch.float32)
    assert not widened[3, 32:64].any()
    assert (widened - weight).abs().max() < weight.abs().max() / 2 ** (bits - 2)


@pytest.mark.parametrize(
    ("parts", "are_rounded"),
    [("all", {Q, W1, HEAD}), ("layers", {Q, W1}), ("experts", {W1}), ("attention", {Q})],
)
def test_gate_and_embeddings_stay_as_they_are_and_the_head_if_it_is_not_asked_for(
    tmp_path: Path, parts: str, are_rounded: set[str]
) -> None:
    write_checkpoint(tmp_path)
    config = EngineConfig.model_validate(
        {"quantization": "int4", "quantization_group_size": 32, "quantized_parts": parts}
    )
    checkpoint = open_checkpoint(tmp_path).rounded(config.rounding)
    tensors = read_tensors(checkpoint, [Q, W1, HEAD, *PLAIN], dtype=torch.bfloat16)
    assert {name for name, weight in tensors.items() if isinstance(weight, QuantizedWeight)} == are_rounded
    plain = read_tensors(open_checkpoint(tmp_path), PLAIN, dtype=torch.bfloat16)
    assert all(torch.equal(tensors[name], plain[name]) for name in PLAIN)  # type: ignore[arg-type]


@pytest.mark.parametrize(("numbers", "bits"), [("int8", 8), ("int4", 8), ("fp8", None)])
def test_a_head_has_eight_bits_where_others_have_four_and_stays_beside_fp8(
    tmp_path: Path, numbers: Numbers, bits: int | None
) -> None:
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path).rounded(Rounding.to(numbers, 32, "all"))
    head = read_tensors(checkpoint, [HEAD], dtype=torch.bfloat16)[HEAD]
    assert (head.bits if isinstance(head, QuantizedWeight) else None) == bits


def test_processes_that_round_differently_do_not_take_each_other_for_the_same_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ways = [
        None,
        *(Rounding.to(numbers, 128, "all") for numbers in get_args(Numbers)),
        Rounding.to("int4", 32, "all"),
        Rounding.to("int4", 32, "layers"),
        Rounding.to("int4", 32, "experts"),
    ]
    prints = [checkpoint.rounded(way).fingerprint for way in ways]
    assert prints[0] == checkpoint.fingerprint
    assert len(set(prints)) == len(ways)
    assert prints == [open_checkpoint(tmp_path).rounded(way).fingerprint for way in ways]


def test_what_is_small_already_is_not_rounded_again(tmp_path: Path) -> None:
    write_quantized(tmp_path, gptq())
    with pytest.raises(ConfigError, match=r"engine\.quantization: .* is quantised already; leave it out"):
        open_checkpoint(tmp_path).rounded(Rounding.to("int4", 128, "all"))


def test_a_plan_counts_what_kernels_hold(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    plain, small = (open_checkpoint(tmp_path).rounded(way) for way in (None, Rounding.to("int4", 16, "all")))
    held, widened = (held_weights(checkpoint, "bfloat16", "cpu") for checkpoint in (small, plain))
    assert held.expert / widened.expert == (0.5 + 2 / 16) / 2
    assert held_weights(small, "float32", "cpu") == held_weights(plain, "float32", "cpu")
