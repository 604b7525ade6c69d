"""What a model is made of: its sizes, and the names and shapes of its tensors. Knows neither files, tensors nor Ray.

Names are the hub's, whatever layout a checkpoint is stored in; a tensor's shape is [out, in] as in `torch.nn.Linear`.

    coordinator   model.embed_tokens, model.layers.N.{self_attn, norms, block_sparse_moe.gate}, model.norm, lm_head
    expert E      model.layers.N.block_sparse_moe.experts.E.{w1, w2, w3}

A dense model (Mistral 7B) has a feed-forward network in place of gate and experts, and is the coordinator's as a whole:

    coordinator   … model.layers.N.mlp.{gate_proj, up_proj, down_proj}, an expert's w1, w3 and w2

What layers of other families have beside is the coordinator's: q, k and v's biases, q_norm and k_norm, and the shared
expert's network with its gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.checkpoint.rope import RopeScaling

StoredDtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How the K experts of a token are weighed, which has the highest scores there. As it comes, Mixtral's way."""

    softmax: Literal["all", "chosen"] = "all"  # of the scores of all experts, or of the K chosen
    renormalised: bool = True  # the weights of the chosen add up to one; of the chosen alone they do anyway
    rounded: bool = False  # the weights are rounded to what the model computes in; else they are fp32


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer is made of. Experts, a feed-forward network for every token, or both: a shared expert."""

    gate: GateSpec | None = None  # None: no experts
    dense_size: int = 0  # intermediate size of the network for every token; 0: there is none
    dense_is_gated: bool = False  # what that network says is multiplied by the sigmoid of a score of its own
    has_qkv_bias: bool = False
    qk_norm: Literal["head", "whole"] | None = None  # of queries and keys: each head for itself, or all heads as one
    clip_qkv: float | None = None  # what queries, keys and values do not exceed

    @property
    def has_experts(self) -> bool:
        """Whether rows are sent to experts."""
        return self.gate is not None


@dataclass(frozen=True, slots=True)
class Multipliers:
    """What some families scale. As they come: nothing."""

    embedding: float = 1.0
    residual: float = 1.0  # what attention and feed-forward add
    attention: float | None = None  # scores of queries and keys; None: 1 / sqrt(head_dim), as everybody
    logits_divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a decoder, of experts or dense. Range-checked by whoever builds it from a file."""

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    intermediate_size: int  # of one expert; of a dense model that of each layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int  # 0: dense
    top_k: int  # experts per token; 0: dense
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # tokens
    sliding_window: int | None  # tokens; None: full attention
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: StoredDtype  # what the checkpoint says it is meant to run in
    rope_scaling: RopeScaling | None = None
    multipliers: Multipliers = Multipliers()
    has_scores: bool = False  # attention has the scores of a step's tokens in memory: sinks are among them, say
    widened: int = 0  # numbers of a token in a layer of which torch makes copies in fp32: values not as wide as keys
    index_heads: int = 0  # of an indexer, which has scores of its own; 0: there is none

    @property
    def num_layers(self) -> int:
        """All of them."""
        return len(self.layers)

    @property
    def num_expert_layers(self) -> int:
        """Those that send rows to experts."""
        return sum(layer.has_experts for layer in self.layers)

    @property
    def is_plain(self) -> bool:
        """Whether each layer is Mixtral's or Llama's, and nothing is scaled."""
        plain = (LayerSpec(gate=GateSpec()), *(LayerSpec(dense_size=layer.dense_size) for layer in self.layers))
        return self.multipliers == Multipliers() and all(layer in plain for layer in self.layers)

    @property
    def is_dense(self) -> bool:
        """Whether every layer has one feed-forward network instead of experts."""
        return self.num_experts == 0


def compute_dtype(setting: Literal["auto", "float32", "bfloat16"], architecture: Architecture) -> ComputeDtype:
    """What weights and activations are held in. `auto` is what the checkpoint says; float16 runs as bfloat16."""
    if setting != "auto":
        return setting
    return "float32" if architecture.dtype == "float32" else "bfloat16"


def coordinator_tensors(architecture: Architecture) -> dict[str, Shape]:
    """Every tensor of the half that holds attention, norms, gates and embeddings: all of them, of a dense model."""
    a = architecture
    q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for index, layer in enumerate(a.layers):
        prefix = f"model.layers.{index}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": (a.hidden_size,),
            f"{prefix}.self_attn.q_proj.weight": (q_size, a.hidden_size),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, a.hidden_size),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, a.hidden_size),
            f"{prefix}.self_attn.o_proj.weight": (a.hidden_size, q_size),
            f"{prefix}.post_attention_layernorm.weight": (a.hidden_size,),
        }
        if layer.has_qkv_bias:
            tensors |= {
                f"{prefix}.self_attn.{name}_proj.bias": (size,)
                for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size))
            }
        if layer.qk_norm is not None:
            of_heads = (a.head_dim, a.head_dim) if layer.qk_norm == "head" else (q_size, kv_size)
            tensors |= {
                f"{prefix}.self_attn.{name}_norm.weight": (size,) for name, size in zip("qk", of_heads, strict=True)
            }
        if layer.has_experts:
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (a.num_experts, a.hidden_size)
        if layer.dense_size:
            tensors |= feed_forward_tensors(a, index)
        if layer.dense_is_gated:
            tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, a.hidden_size)
    tensors["model.norm.weight"] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        tensors["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return tensors


def feed_forward_tensors(architecture: Architecture, layer: int) -> dict[str, Shape]:
    """The three matrices of a layer's network for every token: y = down_proj(silu(gate_proj x) * up_proj x)."""
    spec = architecture.layers[layer]
    prefix = f"model.layers.{layer}.mlp{'.shared_expert' if spec.has_experts else ''}"
    up = (spec.dense_size, architecture.hidden_size)
    return {f"{prefix}.gate_proj.weight": up, f"{prefix}.down_proj.weight": up[::-1], f"{prefix}.up_proj.weight": up}


def expert_tensors(architecture: Architecture, layer: int, expert: int) -> dict[str, Shape]:
    """The three matrices of one expert in one layer: y = w2(silu(w1 x) * w3 x). None where the layer has no experts."""
    if not architecture.layers[layer].has_experts:
        return {}
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    up = (architecture.intermediate_size, architecture.hidden_size)
    return {f"{prefix}.w1.weight": up, f"{prefix}.w2.weight": up[::-1], f"{prefix}.w3.weight": up}


def all_tensors(architecture: Architecture) -> Mapping[str, Shape]:
    """Every tensor of the model, coordinator's first."""
    tensors = coordinator_tensors(architecture)
    for layer in range(architecture.num_layers):
        for expert in range(architecture.num_experts):
            tensors |= expert_tensors(architecture, layer, expert)
    return tensors
