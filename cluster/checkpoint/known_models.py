"""Sizes and formats of models of the hub, for plans made where their weights are not. Reads nothing.

From each model's config.json (`quantize_config.json`, or its card for FP8) on its main branch. What is served is always
read from the checkpoint itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.checkpoint.architecture import Architecture, LayerSpec, Multipliers
from cluster.checkpoint.families import granitemoe, mixtral, qwen2_moe
from cluster.checkpoint.quantization.scheme import Awq, Gptq, Scheme, Values
from cluster.checkpoint.rope import Llama3Rope


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One of the hub."""

    architecture: Architecture
    scheme: Scheme | None = None  # of its experts and its attention; None: not quantised


MIXTRAL_8X7B = Architecture(
    layers=32 * (mixtral.LAYER,),
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=32768,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
)
MIXTRAL_8X22B = replace(
    MIXTRAL_8X7B,
    layers=56 * (mixtral.LAYER,),
    hidden_size=6144,
    intermediate_size=16384,
    num_heads=48,
    max_position_embeddings=65536,
)
MIXTRAL_8X22B_INSTRUCT = replace(MIXTRAL_8X22B, vocab_size=32768)
MISTRAL_7B = replace(
    MIXTRAL_8X7B,
    layers=32 * (LayerSpec(dense_size=14336),),
    num_experts=0,
    top_k=0,
    rope_theta=1e4,
    sliding_window=4096,
)
MISTRAL_7B_V2 = replace(MISTRAL_7B, rope_theta=1e6, sliding_window=None)
MISTRAL_7B_V3 = replace(MISTRAL_7B_V2, vocab_size=32768)


_QWEN3_GATE = replace(qwen2_moe.GATE, renormalised=True)
QWEN3_30B_A3B = Architecture(
    layers=48 * (LayerSpec(gate=_QWEN3_GATE, qk_norm="head"),),
    hidden_size=2048,
    intermediate_size=768,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=151643,
    eos_token_ids=(151645,),
    dtype="bfloat16",
)
QWEN3_235B_A22B = replace(
    QWEN3_30B_A3B,
    layers=94 * (LayerSpec(gate=_QWEN3_GATE, qk_norm="head"),),
    hidden_size=4096,
    intermediate_size=1536,
    num_heads=64,
)
QWEN3_8B = replace(
    QWEN3_30B_A3B,
    layers=36 * (LayerSpec(dense_size=12288, qk_norm="head"),),
    hidden_size=4096,
    intermediate_size=12288,
    num_kv_heads=8,
    num_experts=0,
    top_k=0,
)
QWEN15_MOE_A2_7B = replace(
    QWEN3_30B_A3B,
    layers=24 * (LayerSpec(gate=qwen2_moe.GATE, dense_size=5632, dense_is_gated=True, has_qkv_bias=True),),
    intermediate_size=1408,
    num_heads=16,
    num_kv_heads=16,
    num_experts=60,
    top_k=4,
    max_position_embeddings=8192,
    eos_token_ids=(151643,),
)
QWEN25_7B = replace(
    QWEN3_30B_A3B,
    layers=28 * (LayerSpec(dense_size=18944, has_qkv_bias=True),),
    hidden_size=3584,
    intermediate_size=18944,
    num_heads=28,
    num_experts=0,
    top_k=0,
    vocab_size=152064,
    max_position_embeddings=32768,
)
OLMOE_1B_7B = Architecture(
    layers=16 * (LayerSpec(gate=qwen2_moe.GATE, qk_norm="whole"),),
    hidden_size=2048,
    intermediate_size=1024,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=8,
    vocab_size=50304,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=4096,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_ids=(50279,),
    dtype="bfloat16",
)
GRANITE_3B_A800M = Architecture(
    layers=32 * (granitemoe.LAYER,),
    hidden_size=1536,
    intermediate_size=512,
    num_heads=24,
    num_kv_heads=8,
    head_dim=64,
    num_experts=40,
    top_k=8,
    vocab_size=49155,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=4096,
    sliding_window=None,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
    dtype="bfloat16",
    multipliers=Multipliers(embedding=12.0, attention=0.015625, residual=0.22, logits_divisor=6.0),
)
GRANITE_1B_A400M = replace(
    GRANITE_3B_A800M, layers=24 * (granitemoe.LAYER,), hidden_size=1024, num_heads=16, num_experts=32
)
LLAMA_31_8B = Architecture(
    layers=32 * (LayerSpec(dense_size=14336),),
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=0,
    top_k=0,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=131072,
    sliding_window=None,
    tie_word_embeddings=False,
    bos_token_id=128000,
    eos_token_ids=(128001,),
    dtype="bfloat16",
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
)

AWQ_128 = Awq(128)
FP8_ONE_SCALE = Values(8, is_float=True, block=(None, None))  # AutoFP8's: one for each matrix


def _gptq(bits: int, group_size: int | None) -> Gptq:
    """As AutoGPTQ wrote them: symmetric, with act-order."""
    return Gptq(bits, group_size, act_order=True, symmetric=True, stored_less_one=True)


KNOWN_MODELS: dict[str, KnownModel] = {
    "mistralai/Mixtral-8x7B-v0.1": KnownModel(MIXTRAL_8X7B),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": KnownModel(MIXTRAL_8X7B),
    "mistralai/Mixtral-8x22B-v0.1": KnownModel(MIXTRAL_8X22B),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": KnownModel(MIXTRAL_8X22B_INSTRUCT),
    "mistralai/Mistral-7B-v0.1": KnownModel(MISTRAL_7B),
    "mistralai/Mistral-7B-Instruct-v0.1": KnownModel(MISTRAL_7B),
    "mistralai/Mistral-7B-Instruct-v0.2": KnownModel(MISTRAL_7B_V2),
    "mistralai/Mistral-7B-v0.3": KnownModel(MISTRAL_7B_V3),
    "mistralai/Mistral-7B-Instruct-v0.3": KnownModel(MISTRAL_7B_V3),
    "Qwen/Qwen3-30B-A3B": KnownModel(QWEN3_30B_A3B),
    "Qwen/Qwen3-235B-A22B": KnownModel(QWEN3_235B_A22B),
    "Qwen/Qwen3-8B": KnownModel(QWEN3_8B),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel(QWEN25_7B),
    "Qwen/Qwen1.5-MoE-A2.7B": KnownModel(QWEN15_MOE_A2_7B),
    "allenai/OLMoE-1B-7B-0924": KnownModel(OLMOE_1B_7B),
    "allenai/OLMoE-1B-7B-0125-Instruct": KnownModel(OLMOE_1B_7B),
    "ibm-granite/granite-3.0-1b-a400m-instruct": KnownModel(GRANITE_1B_A400M),
    "ibm-granite/granite-3.0-3b-a800m-instruct": KnownModel(GRANITE_3B_A800M),
    "meta-llama/Llama-3.1-8B": KnownModel(LLAMA_31_8B),
    "meta-llama/Llama-3.1-8B-Instruct": KnownModel(replace(LLAMA_31_8B, eos_token_ids=(128001, 128008, 128009))),
    "TheBloke/Mixtral-8x7B-v0.1-GPTQ": KnownModel(MIXTRAL_8X7B, _gptq(4, None)),
    "TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": KnownModel(MIXTRAL_8X7B, _gptq(4, None)),
    "TheBloke/mixtral-8x7b-v0.1-AWQ": KnownModel(MIXTRAL_8X7B, AWQ_128),
    "casperhansen/mixtral-instruct-awq": KnownModel(MIXTRAL_8X7B, AWQ_128),
    "RedHatAI/Mixtral-8x7B-Instruct-v0.1-FP8": KnownModel(MIXTRAL_8X7B, FP8_ONE_SCALE),
    "neuralmagic/Mixtral-8x7B-Instruct-v0.1-FP8": KnownModel(MIXTRAL_8X7B, FP8_ONE_SCALE),
    "neuralmagic/Mixtral-8x22B-Instruct-v0.1-FP8-dynamic": KnownModel(MIXTRAL_8X22B_INSTRUCT, FP8_ONE_SCALE),
    "TheBloke/Mistral-7B-v0.1-AWQ": KnownModel(MISTRAL_7B, AWQ_128),
    "TheBloke/Mistral-7B-Instruct-v0.1-AWQ": KnownModel(MISTRAL_7B, AWQ_128),
    "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ": KnownModel(MISTRAL_7B_V2, _gptq(4, 128)),
    "solidrust/Mistral-7B-Instruct-v0.3-AWQ": KnownModel(MISTRAL_7B_V3, AWQ_128),
}
