"""Maps a model's tensors to byte ranges of stored ones, for each way a model is written. Knows names, reads no file.

    hub               model.layers.N.block_sparse_moe.experts.E.w1.weight   [F, D]
    one by one        model.layers.N.mlp.experts.E.gate_proj.weight         [F, D]      by whoever quantises experts so
    transformers 5    model.layers.N.mlp.experts.gate_up_proj               [E, 2F, D]  w1 = rows [:F], w3 = rows [F:]
                      model.layers.N.mlp.experts.down_proj                  [E, D, F]
    Granite           model.layers.N.block_sparse_moe.input_linear.weight   [E, 2F, D]  the same two
                      model.layers.N.block_sparse_moe.output_linear.weight  [E, D, F]
    Mistral           layers.N.feed_forward.experts.E.w1.weight             [F, D]
    Mistral, early    layers.N.block_sparse_moe.w1                          [E·F, D]    and w2 so too, transposed

with E experts, F intermediate size, D hidden size. The feed-forward network of a dense layer is `mlp.gate_proj.weight`
(w1), `up_proj` (w3) and `down_proj` (w2) on the hub, `feed_forward.w1.weight` and so on at Mistral. Mistral interleaves
the rows of wq and wk for its rotary embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Literal

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.config import Quantization
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef, codes_name, is_unused, locate_quantized
from cluster.checkpoint.safetensors_header import StoredTensor
from cluster.checkpoint.tensor_ref import Source, TensorRef
from cluster.errors import CheckpointError

Layout = Literal["huggingface", "mistral"]
SUPPORTED_DTYPES = ("F32", "BF16", "F16")

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # computed from rope_theta
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
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


Ref = TensorRef | QuantizedRef | Mxfp4Ref  # the last of families that transformers computes


def locate_tensors(
    architecture: Architecture,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    directory: Path,
    quantization: Quantization | None = None,
) -> dict[str, Ref]:
    """A byte range for every tensor of the model. Raises CheckpointError: missing, mis-shaped, unsupported, unknown."""
    candidates = _huggingface_sources if layout == "huggingface" else _mistral_sources
    refs: dict[str, Ref] = {}
    used: set[str] = set()
    for name, shape in all_tensors(architecture).items():
        sources = list(candidates(architecture, name, shape))
        if quantization is not None and len(shape) == 2:
            quantized = _locate_quantized(name, shape, sources, stored, directory, quantization)
            if quantized is not None:
                refs[name] = quantized
                used.update(part.name for part in quantized.stored)
                continue
        source = next((source for source in sources if source.name in stored), None)
        if source is None:
            missing = _spelled_as_others(sources, stored)
            raise CheckpointError(
                f"{directory} has no tensor {missing.name!r}; expected one of shape {missing.shape}"
                f"{_hint(missing.name, stored, quantization)}."
            )
        refs[name] = _locate(name, shape, source, stored[source.name])
        used.add(source.name)
    if quantization is not None and not any(isinstance(ref, QuantizedRef) for ref in refs.values()):
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config says {quantization.method}, and no matrix is stored so."
        )
    for name in stored.keys() - used:
        if not _IGNORED.search(name) and (quantization is None or not is_unused(name)):
            raise CheckpointError(
                f"{stored[name].file}: tensor {name!r} is no part of this architecture, and ignoring it could change "
                "what the model says."
            )
    return refs


def _locate_quantized(
    name: str,
    shape: Shape,
    sources: list[Source],
    stored: Mapping[str, StoredTensor],
    directory: Path,
    quantization: Quantization,
) -> QuantizedRef | None:
    """Where the matrix is quantised. Raises CheckpointError also where it should be and is not."""
    modules = [source.name.removesuffix(".weight") for source in sources if not source.is_part]
    is_gate = name.endswith((".gate.weight", "_gate.weight"))
    classes = {"Embedding"} if name == "model.embed_tokens.weight" else {"Linear"}
    schemes = quantization.schemes_of(modules, classes)
    ref = locate_quantized(name, shape, schemes, sources, stored)
    # Whoever lists no gate may mean so: transformers 5 has none that is a Linear.
    if ref is None and schemes and quantization.is_told_by_name and not is_gate:
        wanted = codes_name(schemes[0], shape, sources[0])
        plain = next((stored[source.name] for source in sources if source.name in stored), None)
        raise CheckpointError(
            f"{directory} has no tensor {wanted!r}, which quantization_config says is {schemes[0]}; it is in no file."
            if plain is None
            else f"{plain.file}: {name!r} is stored in {plain.dtype}; quantization_config says that it is "
            f"{schemes[0]}, in {wanted!r}. Where it is meant to be as it was, name it in quantization_config.ignore."
        )
    return ref


def _spelled_as_others(sources: list[Source], stored: Mapping[str, StoredTensor]) -> Source:
    """The one of its names that the checkpoint has in another layer, or of another expert; else the hub's."""
    others = {_anywhere(name) for name in stored}
    return next((source for source in sources if _anywhere(source.name) in others), sources[0])


def _anywhere(name: str) -> str:
    """Its module in any layer, of any expert."""
    return re.sub(r"\.\d+\.", ".N.", name.rpartition(".")[0])


def _hint(name: str, stored: Mapping[str, StoredTensor], quantization: Quantization | None) -> str:
    """Where the matrix is stored in small numbers that the configuration does not tell of."""
    module = name.removesuffix(".weight")
    if quantization is None and f"{module}.qweight" in stored:
        return (
            f". It has {module + '.qweight'!r}: a GPTQ or AWQ checkpoint whose config.json has no quantization_config; "
            "what quantize_config.json or quant_config.json says belongs there"
        )
    return ""


def _locate(name: str, shape: Shape, source: Source, tensor: StoredTensor) -> TensorRef:
    if tensor.shape != source.shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {source.name!r} has shape {tensor.shape}; expected {source.shape}."
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise CheckpointError(
            f"{tensor.file}: tensor {source.name!r} has dtype {tensor.dtype}; expected {', '.join(SUPPORTED_DTYPES)}."
        )
    return source.ref(name, shape, tensor)


def _huggingface_sources(a: Architecture, name: str, shape: Shape) -> Iterator[Source]:
    yield Source(name, shape)
    if not (match := _EXPERT.fullmatch(name)):
        yield Source(name.replace(".block_sparse_moe.", ".mlp."), shape)
        for router in ("router.layer", "router"):
            yield Source(name.replace(".block_sparse_moe.gate.", f".block_sparse_moe.{router}."), shape)
        return
    layer, expert, matrix = match[1], int(match[2]), match[3]
    for module in (matrix, _PROJECTIONS[matrix]):
        yield Source(f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight", shape)
    size = a.intermediate_size * a.hidden_size
    if matrix == "w2":
        fused, of_granite = "down_proj", "output_linear"
        whole, start = (a.num_experts, a.hidden_size, a.intermediate_size), expert * size
    else:
        fused, of_granite = "gate_up_proj", "input_linear"
        whole = (a.num_experts, 2 * a.intermediate_size, a.hidden_size)
        start = (2 * expert + (matrix == "w3")) * size
    for suffix in ("", ".weight"):
        yield Source(f"model.layers.{layer}.mlp.experts.{fused}{suffix}", whole, start)
    yield Source(f"model.layers.{layer}.block_sparse_moe.{of_granite}.weight", whole, start)
    yield Source(f"model.layers.{layer}.block_sparse_moe.experts.{fused}", whole, start)


def _mistral_sources(a: Architecture, name: str, shape: Shape) -> Iterator[Source]:
    if match := _EXPERT.fullmatch(name):
        layer, expert, matrix = match[1], int(match[2]), match[3]
        yield Source(f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight", shape)
        whole, start = (a.num_experts * a.intermediate_size, a.hidden_size), expert * prod(shape)
        yield Source(f"layers.{layer}.block_sparse_moe.{matrix}", whole, start, transposed=matrix == "w2")
    elif match := _LAYER.fullmatch(name):
        heads = {"self_attn.q_proj.weight": a.num_heads, "self_attn.k_proj.weight": a.num_kv_heads}.get(match[2])
        yield Source(f"layers.{match[1]}.{_MISTRAL_NAMES[match[2]]}", shape, interleaved_heads=heads)
        yield Source(f"layers.{match[1]}.{match[2]}", shape)  # the early name of the gate
    else:
        yield Source(_MISTRAL_NAMES[name], shape)
