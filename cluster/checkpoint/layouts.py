"""Maps a model's tensors to byte ranges of stored ones, for each way a model is written. Knows names, reads no file.

    hub               model.layers.N.block_sparse_moe.experts.E.w1.weight   [F, D]
    transformers 5    model.layers.N.mlp.experts.gate_up_proj               [E, 2F, D]  w1 = rows [:F], w3 = rows [F:]
                      model.layers.N.mlp.experts.down_proj                  [E, D, F]
    Mistral           layers.N.feed_forward.experts.E.w1.weight             [F, D]
    Mistral, early    layers.N.block_sparse_moe.w1                          [E·F, D]    and w2 so too, transposed

with E experts, F intermediate size, D hidden size. The feed-forward network of a dense layer is `mlp.gate_proj.weight`
(w1), `up_proj` (w3) and `down_proj` (w2) on the hub, `feed_forward.w1.weight` and so on at Mistral. Mistral interleaves
the rows of wq and wk for its rotary embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor
from cluster.errors import CheckpointError

Layout = Literal["huggingface", "mistral"]
SUPPORTED_DTYPES = ("F32", "BF16", "F16")

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # computed from rope_theta
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MISTRAL_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "block_sparse_moe.gate.weight": "feed_forward.gate.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor of the model lies: a contiguous byte range, and what is left to do once it is read."""

    name: str  # the hub's
    file: Path
    dtype: str  # "F32", "BF16" or "F16"
    shape: Shape  # as the model wants it
    offset: int  # bytes from the start of the file
    nbytes: int
    interleaved_heads: int | None = None  # rows of each head alternate (0, h/2, 1, h/2+1, …) and must be sorted out
    transposed: bool = False  # the bytes are those of the [in, out] matrix


@dataclass(frozen=True, slots=True)
class _Source:
    """A stored tensor that may hold one of the model's: at element `start` of a tensor of exactly this shape."""

    name: str
    shape: Shape
    start: int = 0
    interleaved_heads: int | None = None
    transposed: bool = False


def locate_tensors(
    architecture: Architecture, layout: Layout, stored: Mapping[str, StoredTensor], directory: Path
) -> dict[str, TensorRef]:
    """A byte range for every tensor of the model. Raises CheckpointError: missing, mis-shaped, unsupported, unknown."""
    candidates = _huggingface_sources if layout == "huggingface" else _mistral_sources
    refs: dict[str, TensorRef] = {}
    used: set[str] = set()
    for name, shape in all_tensors(architecture).items():
        sources = list(candidates(architecture, name, shape))
        source = next((source for source in sources if source.name in stored), None)
        if source is None:
            raise CheckpointError(f"{directory} has no tensor {sources[0].name!r}; expected one of shape {shape}.")
        refs[name] = _locate(name, shape, source, stored[source.name])
        used.add(source.name)
    for name in stored.keys() - used:
        if not _IGNORED.search(name):
            raise CheckpointError(
                f"{stored[name].file}: tensor {name!r} is no part of this architecture, and ignoring it could change "
                "what the model says."
            )
    return refs


def _locate(name: str, shape: Shape, source: _Source, tensor: StoredTensor) -> TensorRef:
    if tensor.shape != source.shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {source.name!r} has shape {tensor.shape}; expected {source.shape}."
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise CheckpointError(
            f"{tensor.file}: tensor {source.name!r} has dtype {tensor.dtype}; expected {', '.join(SUPPORTED_DTYPES)}."
        )
    item = ITEM_BYTES[tensor.dtype]
    offset, nbytes = tensor.offset + source.start * item, prod(shape) * item
    return TensorRef(
        name, tensor.file, tensor.dtype, shape, offset, nbytes, source.interleaved_heads, source.transposed
    )


def _huggingface_sources(a: Architecture, name: str, shape: Shape) -> Iterator[_Source]:
    yield _Source(name, shape)
    if not (match := _EXPERT.fullmatch(name)):
        yield _Source(name.replace(".block_sparse_moe.", ".mlp."), shape)
        return
    layer, expert, matrix = match[1], int(match[2]), match[3]
    size = a.intermediate_size * a.hidden_size
    if matrix == "w2":
        fused, whole, start = "down_proj", (a.num_experts, a.hidden_size, a.intermediate_size), expert * size
    else:
        fused, whole = "gate_up_proj", (a.num_experts, 2 * a.intermediate_size, a.hidden_size)
        start = (2 * expert + (matrix == "w3")) * size
    for suffix in ("", ".weight"):
        yield _Source(f"model.layers.{layer}.mlp.experts.{fused}{suffix}", whole, start)


def _mistral_sources(a: Architecture, name: str, shape: Shape) -> Iterator[_Source]:
    if match := _EXPERT.fullmatch(name):
        layer, expert, matrix = match[1], int(match[2]), match[3]
        yield _Source(f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight", shape)
        whole, start = (a.num_experts * a.intermediate_size, a.hidden_size), expert * prod(shape)
        yield _Source(f"layers.{layer}.block_sparse_moe.{matrix}", whole, start, transposed=matrix == "w2")
    elif match := _LAYER.fullmatch(name):
        heads = {"self_attn.q_proj.weight": a.num_heads, "self_attn.k_proj.weight": a.num_kv_heads}.get(match[2])
        yield _Source(f"layers.{match[1]}.{_MISTRAL_NAMES[match[2]]}", shape, interleaved_heads=heads)
        yield _Source(f"layers.{match[1]}.{match[2]}", shape)  # the early name of the gate
    else:
        yield _Source(_MISTRAL_NAMES[name], shape)
