"""Writes a checkpoint as GGUF, llama.cpp's format, in one of its types. Runs nothing.

Tensors have llama.cpp's names. Its rotary embedding pairs neighbouring rows of a head where the hub's pairs halves, so
rows of the query and key projections change places. Matrices of a layer's experts are one tensor. Norms and gates stay
fp32, as in llama.cpp's own converter. There is no tokenizer in it: prompts are token ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.commands.bench.shapes import num_parameters
from cluster.errors import ConfigError, SetupError
from experts_service.kernels.experts import expert_tensor_names
from experts_service.quantization.weight import dense
from experts_service.weights import read_tensors

SPARE_BYTES = 64 * 2**20


class GgufType(StrEnum):
    """What matrices are stored in; the names are llama.cpp's."""

    F32 = "f32"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


BITS = {GgufType.F32: 32, GgufType.BF16: 16, GgufType.Q8_0: 8.5, GgufType.Q4_0: 4.5}  # of a number, scales included


def write_gguf(checkpoint: Checkpoint, file: Path, kind: GgufType) -> None:
    """Raises SetupError without the package `gguf` or room, ConfigError for a model that llama.cpp has no like of."""
    try:
        import gguf
    except ImportError as error:
        raise SetupError("--compare llama.cpp needs `pip install manta-serve[bench]`, which compiles it") from error
    a = checkpoint.architecture
    if a.sliding_window is not None:
        raise ConfigError("llama.cpp has no sliding window for this family")
    if not a.is_plain or a.rope_scaling is not None:
        raise ConfigError("llama.cpp is compared on models whose layers are Mixtral's or Llama's")
    _check_room(a, file, kind)
    writer = gguf.GGUFWriter(file, "llama")
    _add_sizes(writer, a)
    quantization = gguf.GGMLQuantizationType[kind.name]
    for name, tensor in _tensors(checkpoint):
        array = tensor.float().numpy()
        if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_room(architecture: Architecture, file: Path, kind: GgufType) -> None:
    need = int(num_parameters(architecture) * BITS[kind] / 8) + SPARE_BYTES
    free = shutil.disk_usage(file.parent).free
    if need > free:
        raise SetupError(f"{file.parent} has {free / 1e9:.1f} GB free, and the GGUF file needs {need / 1e9:.1f} GB")


def _add_sizes(writer: Any, a: Architecture) -> None:
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(a.max_position_embeddings)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope_theta)
    writer.add_layer_norm_rms_eps(a.rms_norm_eps)
    if not a.is_dense:
        writer.add_expert_count(a.num_experts)
        writer.add_expert_used_count(a.top_k)
    writer.add_tokenizer_model("none")


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and matrices, one layer in memory at a time."""
    a = checkpoint.architecture

    def read(*names: str) -> list[Tensor]:
        tensors = read_tensors(checkpoint, list(names), dtype=torch.float32, device=torch.device("cpu"))
        return [dense(tensors[name]) for name in names]

    yield "token_embd.weight", read("model.embed_tokens.weight")[0]
    yield "output_norm.weight", read("model.norm.weight")[0]
    if not a.tie_word_embeddings:
        yield "output.weight", read("lm_head.weight")[0]
    for layer in range(a.num_layers):
        hub, block = f"model.layers.{layer}", f"blk.{layer}"
        q, k, v, o = read(*(f"{hub}.self_attn.{name}_proj.weight" for name in "qkvo"))
        yield f"{block}.attn_q.weight", pair_neighbours(q, a.head_dim)
        yield f"{block}.attn_k.weight", pair_neighbours(k, a.head_dim)
        yield f"{block}.attn_v.weight", v
        yield f"{block}.attn_output.weight", o
        before, after = read(f"{hub}.input_layernorm.weight", f"{hub}.post_attention_layernorm.weight")
        yield f"{block}.attn_norm.weight", before
        yield f"{block}.ffn_norm.weight", after
        if a.is_dense:
            gate, down, up = read(*(f"{hub}.mlp.{name}_proj.weight" for name in ("gate", "down", "up")))
            matrices, suffix = (gate, down, up), ""
        else:
            yield f"{block}.ffn_gate_inp.weight", read(f"{hub}.block_sparse_moe.gate.weight")[0]
            experts = [read(*expert_tensor_names(layer, expert)) for expert in range(a.num_experts)]
            w1, w2, w3 = (torch.stack(matrix) for matrix in zip(*experts, strict=True))  # [E, out, in]
            matrices, suffix = (w1, w2, w3), "_exps"
        for name, matrix in zip(("gate", "down", "up"), matrices, strict=True):
            yield f"{block}.ffn_{name}{suffix}.weight", matrix


def pair_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """[heads · H, D]: row i of the first half of a head becomes its row 2i, that of the second half its row 2i + 1."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])  # [heads, 2, H / 2, D]
    return halves.transpose(1, 2).reshape(weight.shape)
