"""The shapes of the demo models: fresh weights by family. Knows sizes; knows nothing of training."""

from collections.abc import Callable
from typing import Any, TypeAlias

from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from cluster.demo_model.training.experts import sort_experts
from cluster.demo_model.training.tokenizer import BOS_ID, CONTEXT, EOS_ID, VOCAB_SIZE

Model: TypeAlias = Any  # MixtralForCausalLM | MistralForCausalLM; transformers is untyped

JITTER = 0.01  # noise on the experts' input: the answer must not hang on one rounding
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def new_mixtral() -> MixtralForCausalLM:
    """Returns 4 layers, 8 experts of which 2 work, 128 wide: 3.9 M parameters."""
    config = MixtralConfig(
        **SHARED, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=JITTER
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # what checks compute with; batched_mm is 40 times slower on one core
    for layer in model.model.layers:
        sort_experts(layer.mlp.experts)
    return model


def new_mistral() -> MistralForCausalLM:
    """Returns 4 layers, 128 wide, one feed-forward network each: 1.9 M parameters."""
    return MistralForCausalLM(MistralConfig(**SHARED, intermediate_size=768, sliding_window=None))


FAMILIES: dict[str, Callable[[], Model]] = {"mixtral": new_mixtral, "mistral": new_mistral}
