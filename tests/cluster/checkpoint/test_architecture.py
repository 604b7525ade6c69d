import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MixtralConfig

from cluster.checkpoint.architecture import Architecture, all_tensors, coordinator_tensors, expert_tensors
from cluster.checkpoint.configuration.hyperparameters import architecture_from_config, architecture_from_params
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.known_models import KNOWN_MODELS
from cluster.errors import CheckpointError
from tests.checkpoints import hub_state_dict, random_mistral, random_mixtral

# As on the hub, mistralai/Mixtral-8x7B-Instruct-v0.1.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

# The same model's params.json.
PARAMS_8X7B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}

# mistralai/Mistral-7B-v0.1, whose params.json names no rope_theta, and v0.3.
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
PARAMS_7B = {key: value for key, value in PARAMS_8X7B.items() if key != "moe"} | {"sliding_window": 4096}
V3 = {"vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None}


def from_config(**changes: Any) -> Architecture:
    return architecture_from_config(JsonDocument(Path("config.json"), MIXTRAL_8X7B | changes))


def from_params(**changes: Any) -> Architecture:
    return architecture_from_params(JsonDocument(Path("params.json"), PARAMS_8X7B | changes), "bfloat16")


def test_mixtral_8x7b_is_read_the_same_from_both_files():
    assert from_config() == from_params()
    assert from_config() == KNOWN_MODELS["mistralai/Mixtral-8x7B-v0.1"].architecture


@pytest.mark.parametrize("changes", [{}, V3], ids=["v0.1", "v0.3"])
def test_mistral_7b_is_dense_and_read_the_same_from_both_files(changes: dict[str, Any]):
    config = architecture_from_config(JsonDocument(Path("config.json"), MISTRAL_7B | changes))
    params = architecture_from_params(JsonDocument(Path("params.json"), PARAMS_7B | changes), "bfloat16")
    assert config == params
    assert config == KNOWN_MODELS[f"mistralai/Mistral-7B-{'v0.3' if changes else 'v0.1'}"].architecture
    assert (config.is_dense, config.num_experts, config.top_k) == (True, 0, 0)
    assert not from_config().is_dense
    parameters = sum(math.prod(shape) for shape in all_tensors(config).values())
    assert parameters == (7_248_023_552 if changes else 7_241_732_096)  # as the models' cards have it


@pytest.mark.parametrize("name", ["sliding_window", "rope_theta", "rms_norm_eps"])
def test_what_a_config_leaves_out_is_transformers_default(name: str):
    """Mixtral's and Mistral's defaults differ."""
    for values, read in ((MISTRAL_7B, MistralConfig), (MIXTRAL_8X7B, MixtralConfig)):
        left = {key: value for key, value in values.items() if key != name}
        ours = architecture_from_config(JsonDocument(Path("config.json"), left))
        reference = read(**{key: value for key, value in left.items() if key != "torch_dtype"})
        theirs = reference.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(reference, name)
        assert getattr(ours, name) == theirs


def test_architectures_alone_tell_a_mistral_from_a_mixtral():
    for values, dense in ((MISTRAL_7B, True), (MIXTRAL_8X7B, False)):
        document = {key: value for key, value in values.items() if key != "model_type"}
        assert architecture_from_config(JsonDocument(Path("config.json"), document)).is_dense is dense


def test_keys_of_transformers_4_and_5_mean_the_same(tmp_path: Path):
    MixtralConfig(
        **{key: value for key, value in MIXTRAL_8X7B.items() if key not in ("torch_dtype", "transformers_version")},
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    written["architectures"] = ["MixtralForCausalLM"]
    assert architecture_from_config(JsonDocument(tmp_path / "config.json", written)) == from_config()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_ids": (2, 7)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (), "bos_token_id": None}),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 32}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"head_dim": None}, {"head_dim": 128}),
        ({"rope_theta": None}, {"rope_theta": 1e6}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1.0}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "default"}}, {"rope_theta": 1e6}),
        ({"torch_dtype": None}, {"dtype": "float32"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
    ],
)
def test_config_variants(changes: dict[str, Any], expected: dict[str, Any]):
    architecture = from_config(**changes)
    assert {key: getattr(architecture, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 10000.0}),
        ({"sliding_window": 4096}, {"sliding_window": 4096}),
        ({"sliding_window": "4096"}, {"sliding_window": 4096}),
        ({"max_seq_len": 65536}, {"max_position_embeddings": 65536}),
        ({"tied_embeddings": True}, {"tie_word_embeddings": True}),
        ({"lora": None, "quantization": {}, "causal": True, "max_batch_size": 0}, {"num_layers": 32}),
    ],
)
def test_params_variants(changes: dict[str, Any], expected: dict[str, Any]):
    architecture = from_params(**changes)
    assert {key: getattr(architecture, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": None, "architectures": None}, "model_type is None"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "architectures is"),
        ({"architectures": "MixtralForCausalLM"}, "architectures is"),
        ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map points at Python code"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method is 'hqq', which is none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rotary scaling of type 'dynamic'; expected one of default",
        ),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters asks for rotary scaling of type ['yarn']"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}}, "rope_scaling.beta_fast is not known"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.high_freq_factor is 4; expected more than low_freq_factor=4",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 4097}, "hidden_size is 4097; expected a multiple of num_attention_heads=32"),
        ({"hidden_size": 10**30}, "hidden_size is 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_key_value_heads": 7}, "num_attention_heads is 32; expected a multiple of num_key_value_heads=7"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most num_local_experts=8"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"head_dim": 3}, "head_dim is 3; expected an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; expected a number above 1 "),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 1e-320}},
            "rope_parameters.beta_fast is 1e-320; expected a number above 0 ",
        ),
        ({"eos_token_id": 32000}, "eos_token_id holds 32000"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id holds '</s>'"),
        (
            {"attention_multiplier": 0.5},
            "attention_multiplier is not known to Manta and may change what the model says",
        ),
        ({"norm_topk_prob": False}, "norm_topk_prob is not known"),
        ({"rope_scaling": {"rope_theta": 1e4, "mrope_section": [1]}}, "rope_scaling.mrope_section is not known"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention is not known"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5",
        ),
        ({"attention_bias": True}, "attention_bias is True, which Manta does not support; expected false"),
        ({"num_experts": 4}, "num_local_experts is not num_experts=4"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types is not 'full_attention' throughout"),
        ({"layer_types": ["full_attention"] * 31}, "expected the kind of attention of each layer"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected the kind of"),
        ({"layer_types": [["full_attention"]] * 32}, "layer_types is not 'full_attention' throughout"),
        ({"use_sliding_window": True}, "use_sliding_window is True, and sliding_window is None: they contradict"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"rope_parameters": []}, "rope_parameters is []; expected an object"),
    ],
)
def test_config_refusals_name_file_and_key(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        from_config(**changes)
    assert caught.value.message.startswith("config.json: ")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta is 1.0; expected a number above 1 "),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "moe.num_experts_per_tok is 3; expected at most"),
        ({"moe": {"num_experts": 2}}, "moe.num_experts_per_tok is missing"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization is {'qformat_weight': 'fp8_e4m3'}, which"),
        ({"lora": {"rank": 4}}, "lora is {'rank': 4}, which"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is not known to Manta"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 1, "route_every_n": 2}}, "moe.route_every_n is not known"),
        ({"causal": False}, "causal is False, which Manta does not support; expected true"),
        ({"dim": 0}, "dim is 0"),
        ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
        ({"n_kv_heads": 5}, "n_heads is 32; expected a multiple of n_kv_heads=5"),
    ],
)
def test_params_refusals_name_file_and_key(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        from_params(**changes)
    assert caught.value.message.startswith("params.json: ")
    assert message in caught.value.message


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_names_of_a_dense_model_are_those_of_transformers(tied: bool):
    model = random_mistral(tie_word_embeddings=tied)
    config = JsonDocument(Path("config.json"), model.config.to_dict() | {"architectures": ["MistralForCausalLM"]})
    architecture = architecture_from_config(config)
    assert all_tensors(architecture) == coordinator_tensors(architecture)
    assert all_tensors(architecture) == {name: tuple(t.shape) for name, t in hub_state_dict(model).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_names_and_shapes_are_those_of_transformers(tied: bool):
    model = random_mixtral(tie_word_embeddings=tied)
    config = JsonDocument(Path("config.json"), model.config.to_dict() | {"architectures": ["MixtralForCausalLM"]})
    architecture = architecture_from_config(config)
    assert all_tensors(architecture) == {name: tuple(t.shape) for name, t in hub_state_dict(model).items()}
    coordinator = coordinator_tensors(architecture)
    assert not any(".experts." in name for name in coordinator)
    assert ("lm_head.weight" in coordinator) is not tied
    assert expert_tensors(architecture, 1, 3)["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (32, 48)
