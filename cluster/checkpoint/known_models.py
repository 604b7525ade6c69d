"""Sizes and formats of models of the hub, for plans made where their weights are not. Reads nothing.

From each model's config.json (`quantize_config.json`, or its card for FP8) on its main branch. What is served is always
read from the checkpoint itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.checkpoint.architecture import Architecture, LayerSpec
from cluster.checkpoint.families import mixtral
from cluster.checkpoint.quantization.scheme import Awq, Gptq, Scheme, Values


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
