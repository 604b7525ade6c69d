"""The sizes of any decoder from its `config.json`, for the transformers backend. Knows keys that families share.

What a family computes is in none of these sizes: its own code in transformers knows that. So nothing is refused here
but what is missing; what that code cannot do behind our interfaces it is refused for where the model is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cluster.checkpoint.architecture import Architecture, GateSpec, LayerSpec, Shape, StoredDtype
from cluster.checkpoint.configuration.hyperparameters import stored_dtype
from cluster.checkpoint.families.family import MAX_LAYERS
from cluster.checkpoint.json_document import LARGEST, JsonDocument
from cluster.checkpoint.layouts import SUPPORTED_DTYPES
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref, quantized_matrices
from cluster.checkpoint.quantization.contents import check_contents
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef, is_unused
from cluster.checkpoint.safetensors_header import StoredTensor
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.errors import CheckpointError

NUM_EXPERTS = (
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    *("num_moe_experts", "n_experts"),
)
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_router_topk"),
    *("experts_per_token", "num_selected_experts"),
)
INTERMEDIATE_SIZE = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim", "intermediate_size")
MISSING = "is missing, by which memory is counted: the family has nothing of the kind, or names it in its own way"
UNTOLD_CONTEXT = 4096  # tokens, where config.json does not say how many

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NOT_SERVED = re.compile(  # DeepSeek-OCR 2 sees with `sam_model` and `qwen2_model`
    r"(?:^|\.)(?:mtp\w*|vision\w*|visual|audio\w*|\w*projector|resampler_model|sam_model|qwen2_model|"
    r"talker|code2wav)\."
)
_NUMBERED = re.compile(r"\.experts\.\d+\.")


def any_architecture(config: JsonDocument, default_dtype: StoredDtype = "float32") -> Architecture:
    """Sizes of the text model. Keys and values are as wide as a head is where they are kept expanded.

    Raises CheckpointError where a size is missing.
    """
    text = text_section(config)
    if config.values.get("is_encoder_decoder") is True:
        raise config.error(
            "is_encoder_decoder", "is true; a model that has an encoder beside its decoder is not served"
        )
    for key in ("vocab_size", "hidden_size", "num_attention_heads"):
        if not text.has(key):
            raise text.error(key, MISSING)
    vocab_size = text.integer("vocab_size")
    num_heads = text.integer("num_attention_heads")
    hidden_size = text.integer("hidden_size")
    num_experts = _first(text, NUM_EXPERTS)
    top_k = _first(text, TOP_K, minimum=min(1, num_experts))
    if text.values.get("sliding_window") == 0 and text.values.get("use_sliding_window") is not False:
        raise text.error("sliding_window", "is 0, and no token would see one; where there is no window it is null")
    bos = text.integers("bos_token_id", vocab_size - 1) or config.integers("bos_token_id", vocab_size - 1)
    eos = text.integers("eos_token_id", vocab_size - 1) or config.integers("eos_token_id", vocab_size - 1)
    size = _first(text, INTERMEDIATE_SIZE) or 1
    layer = LayerSpec(gate=GateSpec()) if num_experts else LayerSpec(dense_size=size)  # which have experts is not told
    return Architecture(
        layers=_num_layers(text) * (layer,),
        hidden_size=hidden_size,
        intermediate_size=size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(text, num_heads),
        head_dim=_head_dim(text, hidden_size, num_heads),
        num_experts=num_experts,
        top_k=top_k or 1 if num_experts else 0,
        vocab_size=vocab_size,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=text.integer("max_position_embeddings", default=UNTOLD_CONTEXT),
        sliding_window=None,  # layers may differ: all is kept
        tie_word_embeddings=False,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        dtype=stored_dtype(text if text.has("dtype") or text.has("torch_dtype") else config, default_dtype),
    )


def text_section(config: JsonDocument) -> JsonDocument:
    """What tells of the text model in the `config.json` of one that also sees, hears or speaks."""
    if config.has("thinker_config"):  # Qwen3-Omni, whose talker speaks
        config = config.section("thinker_config")
    return config.section("text_config") if config.has("text_config") else config


def stored_tensors(
    stored: Mapping[str, StoredTensor], config: JsonDocument
) -> dict[str, TensorRef | QuantizedRef | Mxfp4Ref]:
    """Each under its own name, a quantised matrix under the one that it would have in bf16.

    Raises CheckpointError for one that is neither plain numbers nor a quantised matrix as config.json tells of them.
    """
    text = text_section(config)
    of_matrices = text if text.has("quantization_config") else config
    matrices, used = quantized_matrices(of_matrices, stored)
    tensors: dict[str, TensorRef | QuantizedRef | Mxfp4Ref] = dict(matrices)
    for name, tensor in stored.items():
        if name in used or (matrices and is_unused(name)):
            continue
        if tensor.dtype not in SUPPORTED_DTYPES and tensor.dtype not in ("I64", "I32", "BOOL"):
            told = (
                f"quantization_config tells of none in {tensor.dtype} there" if matrices else "expected plain numbers"
            )
            raise CheckpointError(f"{tensor.file}: tensor {name!r} is {tensor.dtype}; {told}")
        tensors[name] = TensorRef(name, tensor.file, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
    if matrices:
        check_contents(tensors)
    return tensors


class Divided(NamedTuple):
    """Sizes of a model's tensors, by who has them. What predicts further tokens, sees or hears nobody has."""

    own: int  # the coordinator
    expert: int  # one in all layers
    shared: int  # whoever has any expert: what those of a layer share, as a norm of their answers (Muse Spark)


def divided(sizes: Mapping[str, tuple[Shape, int]], architecture: Architecture) -> Divided:
    """By names and shapes, as families have them."""
    own = of_experts = shared = 0
    num_experts = architecture.num_experts
    for name, (shape, size) in sizes.items():
        layer = _LAYER.search(name)
        if _NOT_SERVED.search(name) or (layer is not None and int(layer[1]) >= architecture.num_layers):
            continue
        if ".experts." in name and len(shape) == 1 and not _NUMBERED.search(name):
            if shape[0] == num_experts:
                own += size  # the gate's biases (Laguna)
            else:
                shared += size
        elif ".experts." in name or (num_experts and len(shape) == 3 and shape[0] == num_experts):
            of_experts += size
        else:
            own += size
    return Divided(own, -(-of_experts // max(1, num_experts)), shared)


def _num_layers(config: JsonDocument) -> int:
    """Nemotron-H has a list of what each layer is, and no number of them."""
    kinds = config.values.get("layers_block_type")
    if config.has("num_hidden_layers"):
        return config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    if isinstance(kinds, list) and 0 < len(kinds) <= MAX_LAYERS:
        return len(kinds)
    raise config.error("num_hidden_layers", MISSING)


def _first(config: JsonDocument, keys: Sequence[str], minimum: int = 0) -> int:
    """The first that is there; 0: none is."""
    for key in keys:
        if isinstance(config.values.get(key), list):  # one for each layer
            return max(config.integers(key, LARGEST), default=0)
        if config.has(key):
            return config.integer(key, minimum=minimum)
    return 0


def _num_kv_heads(config: JsonDocument, num_heads: int) -> int:
    if config.has("kv_lora_rank"):  # latent attention, kept expanded: every head has keys of its own
        return num_heads
    return config.integer("num_key_value_heads", default=num_heads)


def _head_dim(config: JsonDocument, hidden_size: int, num_heads: int) -> int:
    """The mean of keys' and values', rounded up, where they differ."""
    if config.has("kv_lora_rank"):
        keys = config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim", minimum=0)
        return -(-(keys + config.integer("v_head_dim")) // 2)
    return config.integer("head_dim", default=max(1, hidden_size // num_heads))
