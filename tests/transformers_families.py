"""Random tiny models of the families of the installed transformers, and what they generate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

SHOWN = (  # to be exact, at the least
    *("gpt_oss", "glm4_moe", "minimax_m2", "ernie4_5_moe", "dots1", "phimoe", "deepseek_v2", "deepseek_v3"),
    *("llama4_text", "granitemoeshared", "mellum", "muse_spark", "step3p7", "ernie4_5_vl_moe"),
    *("mistral_large4", "qwen3_omni_moe"),
)
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 8,  # fewer than prompts have tokens
    "index_n_heads": 32,  # scores are seldom zero, where any may be chosen
    "index_head_dim": 16,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that greedy tokens vary
}
SENSES: dict[str, Any] = {  # of what sees or hears, which is not asked
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
OWN: dict[str, dict[str, Any]] = {  # what a family needs besides
    "llama4_text": {"interleave_moe_layer_step": 2, "num_key_value_heads": 2, "no_rope_layers": [1, 1, 1, 0]},
    "minimax_m2": {"rotary_dim": 8},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *3 * ["sparse"]]},
    "qwen3_vl_moe_text": {"sliding_window": None},  # a cache would have it, and no layer
    "qwen3_omni_moe_text": {"sliding_window": None},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},  # generate asks for it, and it has no default
    "mistral_large4_text": {  # the third layer has the second one's keys and values, and sees what it sees
        "kv_source_layers": [0, 1, 1, 3],
        "indexer_types": ["full", "full", "shared", "full"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "phimoe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 24},
    "minimax_m3_vl_text": {  # as the published one
        "layer_types": ["full_attention", *3 * ["minimax_m3_sparse"]],
        "index_n_heads": 2,
    },
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "muse_spark_text": {"moe_hidden_size": 24},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 24],
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "step3p5": {  # the text model of step3p7; as the published one, whose last layers are clamped
        "pad_token_id": 0,
        "layer_types": ["full_attention", *3 * ["sliding_attention"]],
        "mlp_layer_types": ["dense", *3 * ["sparse"]],
        "num_sliding_attention_heads": 6,
        "share_expert_dim": 24,
        "moe_router_scaling_factor": 1.5,
        "swiglu_limits": [0, 0, 0, 0.02],
        "swiglu_limits_shared": [0, 0, 0, 0.02],
        "partial_rotary_factors": [0.5, 1, 1, 1],
    },
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "glm4_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}

logging.disable_progress_bar()


def tiny_config(model_type: str) -> Any:
    """Of a family's text model, with sizes of our own where it has such keys; of all of it, if that has no head."""
    config_class = CONFIG_MAPPING[model_type]
    whole = config_class()
    thinker = getattr(whole, "thinker_config", whole)  # of what speaks as well
    text = thinker.get_text_config(decoder=True)
    sizes = _known(text, SIZES)
    if "kv_lora_rank" in sizes:
        sizes.pop("head_dim", None)  # it is what is rotated of it
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    tiny = type(text)(**{**sizes, **NO_IDS, **OWN.get(text.model_type, {})})
    if _auto(tiny) is not None or _auto(whole) is None:
        return tiny
    of_text = next(name for name in thinker.sub_configs if getattr(thinker, name) is text)
    parts = {**_small_parts(thinker, but=of_text), of_text: tiny.to_dict()}
    small = type(thinker)(**parts, **NO_IDS, **OWN.get(thinker.model_type, {}))
    return small if thinker is whole else config_class(thinker_config=small.to_dict(), enable_audio_output=False)


def _small_parts(config: Any, but: str = "") -> dict[str, Any]:
    """What a config has beside the text model, and what that has in turn, as small as can be."""
    return {
        name: type(part)(**(_known(part, SENSES) | _small_parts(part) | OWN.get(part.model_type, {}))).to_dict()
        for name in config.sub_configs
        if name != but and (part := getattr(config, name)) is not None
    }


def _known(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of which a config has the keys."""
    known = set(config.to_dict()) | set(config.attribute_map)
    return {key: value for key, value in sizes.items() if key in known}


def _auto(config: Any) -> Any:
    """What builds a model that generates text; None: nothing does."""
    autos = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)


def random_model(config: Any, seed: int = 0) -> Any:
    """In fp32 and eval mode. Norms, biases and sinks are not what they begin as, so that one forgotten shows."""
    torch.manual_seed(seed)
    model = _auto(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
            elif "bias" in name or "sinks" in name or "alpha" in name:
                tensor.normal_(0.0, 0.1)
    return model


def write_family(directory: Path, model_type: str) -> Any:
    """A checkpoint under the names that the hub has, and what of it generates text."""
    model = random_model(tiny_config(model_type))
    model.save_pretrained(directory)
    return getattr(model, "thinker", model)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 90), k=length)


def generated(model: Any, prompt_ids: list[int], count: int) -> list[int]:
    """What transformers generates, greedily."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return output[0, len(prompt_ids) :].tolist()
