import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import rotate_half

from cluster.checkpoint.architecture import coordinator_tensors, expert_tensors
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.errors import CheckpointError
from experts_service import weights
from experts_service.quantization.weight import QuantizedWeight
from experts_service.weights import read_tensors
from tests.checkpoints import TINY, Layout, hub_state_dict, write_checkpoint
from tests.quantized_checkpoints import gptq, write_quantized

LAYOUTS: tuple[Layout, ...] = ("huggingface", "fused", "mistral", "mistral_early")
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": None},
        {"num_local_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4, "sliding_window": 16},
    ],
)
def test_every_layout_reads_the_bits_of_the_reference(tmp_path: Path, layout: Layout, shards: int, overrides):
    model = write_checkpoint(tmp_path, layout=layout, shards=shards, **overrides)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32)
    assert equal(tensors, hub_state_dict(model))
    assert list(tensors) == list(checkpoint.tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def rotated_as_mistral(x: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """mistral-inference's rotary embedding: neighbours are the real and imaginary part of one complex number."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies)  # [T, h/2]
    pairs = torch.view_as_complex(x.double().unflatten(1, (-1, head_dim // 2, 2)))  # [T, heads, h/2]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)


def rotated_as_transformers(x: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies).repeat(1, 2)[:, None]  # [T, 1, h]
    heads = x.double().unflatten(1, (-1, head_dim))
    return heads * angles.cos() + rotate_half(heads) * angles.sin()


def test_mistrals_rotary_of_its_rows_gives_the_scores_of_transformers_rotary_of_ours(tmp_path: Path):
    """Row order is right when q·k is the same under both definitions, each on its own weights."""
    write_checkpoint(tmp_path, layout="mistral")
    raw = load_file(tmp_path / "consolidated.safetensors")
    ours = read_tensors(open_checkpoint(tmp_path), [Q, K], dtype=torch.float32)
    x = torch.randn(7, TINY["hidden_size"])
    head_dim, theta, repeats = TINY["head_dim"], TINY["rope_parameters"]["rope_theta"], 2

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,shd->hts", q, k.repeat_interleave(repeats, dim=1))

    q, k = (x @ raw[f"layers.0.attention.w{name}.weight"].t() for name in "qk")
    theirs = scores(rotated_as_mistral(q, head_dim, theta), rotated_as_mistral(k, head_dim, theta))
    q, k = (x @ ours[name].t() for name in (Q, K))
    expected = scores(rotated_as_transformers(q, head_dim, theta), rotated_as_transformers(k, head_dim, theta))
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours[Q], raw["layers.0.attention.wq.weight"])


def test_transformers_itself_reads_back_what_we_read(tmp_path: Path):
    write_checkpoint(tmp_path, layout="fused", shards=2)
    checkpoint = open_checkpoint(tmp_path)
    reference = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert equal(read_tensors(checkpoint, checkpoint.tensors, dtype=torch.float32), hub_state_dict(reference))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_convert_as_torch_converts(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype):
    model = write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    checkpoint = open_checkpoint(tmp_path)
    tensors = read_tensors(checkpoint, checkpoint.tensors, dtype=wanted)
    assert equal(tensors, {name: tensor.to(stored).to(wanted) for name, tensor in hub_state_dict(model).items()})


def test_only_the_named_tensors_are_read_and_their_bytes_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = write_checkpoint(tmp_path, layout="fused")
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    checkpoint = open_checkpoint(tmp_path)
    names = list(expert_tensors(checkpoint.architecture, layer=1, expert=3))
    reads: list[int] = []
    tensors = read_tensors(checkpoint, names, dtype=torch.float32, on_bytes=reads.append)
    assert equal(tensors, {name: hub_state_dict(model)[name] for name in names})
    assert sum(reads) == sum(checkpoint.tensors[name].nbytes for name in names) == 3 * 48 * 32 * 4
    assert max(reads) == 1000


def test_of_a_quantised_expert_only_its_own_parts_are_read(tmp_path: Path):
    """Its codes, scales, zero points and groups, and no byte of its neighbours."""
    write_quantized(tmp_path, gptq(desc_act=True), num_hidden_layers=2)
    checkpoint = open_checkpoint(tmp_path)
    names = list(expert_tensors(checkpoint.architecture, layer=1, expert=3))
    reads: list[int] = []
    tensors = read_tensors(checkpoint, names, dtype=torch.bfloat16, on_bytes=reads.append)
    assert list(tensors) == names
    assert all(isinstance(tensor, QuantizedWeight) and tensor.dtype is torch.bfloat16 for tensor in tensors.values())
    of_one = 64 * 96 // 2 + 4 * 64 + 2 * 96 * 2 + 2 * 96 // 2  # w1: codes, groups of inputs, scales, zero points
    of_w2 = 64 * 96 // 2 + 4 * 96 + 3 * 64 * 2 + 3 * 64 // 2
    assert sum(reads) == sum(checkpoint.tensors[name].nbytes for name in names) == 2 * of_one + of_w2


def test_a_quantised_file_that_shrank_names_the_part(tmp_path: Path):
    write_quantized(tmp_path, gptq(), num_hidden_layers=1)
    checkpoint = open_checkpoint(tmp_path)
    scales = checkpoint.tensors[Q].stored[1]
    os.truncate(tmp_path / "model.safetensors", scales.offset + 8)
    with pytest.raises(
        CheckpointError, match=r"ends inside tensor 'model.layers.0.self_attn.q_proj.scales', after 8 of"
    ):
        read_tensors(checkpoint, [Q], dtype=torch.float32)


def test_a_file_that_shrank_since_it_was_checked(tmp_path: Path):
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    ref = checkpoint.tensors[Q]
    os.truncate(file, ref.offset + 8)
    with pytest.raises(CheckpointError, match="has shrunk") as caught:
        read_tensors(checkpoint, coordinator_tensors(checkpoint.architecture), dtype=torch.float32)
    assert caught.value.message.startswith(f"{file} ends inside tensor {Q!r}, after 8 of its {ref.nbytes} bytes")


def test_a_file_that_vanished_since_it_was_checked(tmp_path: Path):
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file") as caught:
        read_tensors(checkpoint, [Q], dtype=torch.float32)
    assert Q in caught.value.message
