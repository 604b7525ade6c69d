"""Builds an Architecture from `config.json` (Hugging Face) or `params.json` (Mistral). Knows no weights.

A family's own keys are read in `families`.

What Manta does not run is refused here by name, before a single tensor is looked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast, get_args

from cluster.checkpoint.architecture import Architecture, LayerSpec, StoredDtype
from cluster.checkpoint.configuration.config_keys import check_config, check_params
from cluster.checkpoint.families import FAMILIES, mistral, mixtral
from cluster.checkpoint.families.family import MAX_EXPERTS, MAX_LAYERS, Family, experts_key
from cluster.checkpoint.json_document import JsonDocument, shortened
from cluster.checkpoint.quantization.config import read_quantization

MISTRAL_CONTEXT = 32768  # params.json rarely says how long the context is
MISTRAL_BOS, MISTRAL_EOS = 1, 2  # of every tokenizer that ships beside a params.json

_SILU = ("silu", "swish")  # two names of one function


def architecture_from_config(config: JsonDocument, default_dtype: StoredDtype = "float32") -> Architecture:
    """From Hugging Face's `config.json`; keys of transformers 4 and 5. `default_dtype` is used where it names none."""
    refuse_remote_code(config)
    family = _family(config)
    _refuse_unsupported_config(config, family)
    architecture = replace(family.read(config), dtype=stored_dtype(config, default_dtype))
    _check_attention(config, architecture)
    experts = experts_key(config)
    _check_divisions(
        config, architecture, ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok", experts)
    )
    return architecture


def architecture_from_params(params: JsonDocument, default_dtype: StoredDtype = "float32") -> Architecture:
    """From Mistral's `params.json`, which names no dtype: `default_dtype` is that of the stored embeddings."""
    model_type = params.values.get("model_type", "transformer")
    if model_type != "transformer":
        raise params.error("model_type", f"is {model_type!r}, which Manta does not run; expected 'transformer'")
    check_params(params)
    dense, moe = not params.has("moe"), params.section("moe")
    if params.has("sliding_window") and isinstance(params.values["sliding_window"], str):
        params.values["sliding_window"] = _number_in_quotes(params.values["sliding_window"])
    context_key = next((k for k in ("max_position_embeddings", "max_seq_len") if params.values.get(k)), "")
    vocab_size = params.integer("vocab_size", minimum=3)
    intermediate_size = params.integer("hidden_dim")
    layer = LayerSpec(dense_size=intermediate_size) if dense else mixtral.LAYER
    architecture = Architecture(
        layers=params.integer("n_layers", maximum=MAX_LAYERS) * (layer,),
        hidden_size=params.integer("dim"),
        intermediate_size=intermediate_size,
        num_heads=params.integer("n_heads"),
        num_kv_heads=params.integer("n_kv_heads"),
        head_dim=params.integer("head_dim"),
        num_experts=0 if dense else moe.integer("num_experts", maximum=MAX_EXPERTS),
        top_k=0 if dense else moe.integer("num_experts_per_tok"),
        vocab_size=vocab_size,
        rms_norm_eps=params.number("norm_eps", maximum=1.0),
        rope_theta=params.number(
            "rope_theta",
            default=(mistral if dense and params.has("sliding_window") else mixtral).DEFAULTS.rope_theta,
            minimum=1.0,
        ),
        max_position_embeddings=params.integer(context_key, default=MISTRAL_CONTEXT),
        sliding_window=params.integer("sliding_window") if params.has("sliding_window") else None,
        tie_word_embeddings=params.boolean("tied_embeddings", default=False),
        bos_token_id=MISTRAL_BOS,
        eos_token_ids=(MISTRAL_EOS,),
        dtype=default_dtype,
    )
    _check_divisions(params, architecture, ("n_heads", "n_kv_heads", "moe.num_experts_per_tok", "moe.num_experts"))
    return architecture


def is_native(config: JsonDocument) -> bool:
    """Whether the family has code of ours, or cannot be told."""
    model_type = config.values.get("model_type")
    return not isinstance(model_type, str) or model_type in FAMILIES


def refuse_remote_code(config: JsonDocument) -> None:
    """Raises CheckpointError where the checkpoint wants its own Python code run."""
    if config.has("auto_map"):
        raise config.error("auto_map", "points at Python code in the checkpoint, and Manta runs no remote code")


def _family(config: JsonDocument) -> Family:
    """By `model_type`, which also has to fit `architectures`; by these alone where there is none."""
    model_type, architectures = config.values.get("model_type"), config.values.get("architectures")
    possible = [family for family in FAMILIES.values() if model_type in (None, family.model_type)]
    if not possible or (model_type is None and not architectures):
        raise config.error("model_type", f"is {model_type!r}, which Manta does not run; expected {_one_of_types()}")
    if architectures is None:
        return possible[0]
    named = set(map(str, architectures)) if isinstance(architectures, list) else set()
    named |= {name.removesuffix("Model") + "ForCausalLM" for name in named if name.endswith("Model")}  # without a head
    family = next((family for family in possible if family.causal_lm in named), None)
    if family is None:
        known = sorted(family.causal_lm for family in possible)
        raise config.error("architectures", f"is {architectures!r}, which Manta does not run; expected {known}")
    return family


def _refuse_unsupported_config(config: JsonDocument, family: Family) -> None:
    read_quantization(config)
    activation = config.values.get("hidden_act", "silu")
    if activation not in _SILU:
        raise config.error("hidden_act", f"is {activation!r}; expected 'silu'")
    check_config(config, family)


def _layer_types(config: JsonDocument) -> set[str]:
    """The kinds of attention that layers are said to have, if any are."""
    if not config.has("layer_types"):
        return set()
    kinds = config.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != config.integer("num_hidden_layers") or not kinds:
        raise config.error("layer_types", f"is {shortened(kinds)}; expected the kind of attention of each layer")
    return set(map(str, kinds))


def _check_attention(config: JsonDocument, a: Architecture) -> None:
    """All layers attend alike. Raises CheckpointError where a key says otherwise than `sliding_window`."""
    kind = "full_attention" if a.sliding_window is None else "sliding_attention"
    if not _layer_types(config) <= {kind}:
        raise config.error(
            "layer_types", f"is not {kind!r} throughout, as sliding_window is {config.values.get('sliding_window')}"
        )
    if config.has("use_sliding_window") and config.values["use_sliding_window"] is not (a.sliding_window is not None):
        raise config.error(
            "use_sliding_window",
            f"is {config.values['use_sliding_window']!r}, and sliding_window is {a.sliding_window}: they contradict",
        )


def _check_divisions(document: JsonDocument, a: Architecture, keys: tuple[str, str, str, str]) -> None:
    heads, kv_heads, top_k, experts = keys
    if a.num_heads % a.num_kv_heads:
        raise document.error(heads, f"is {a.num_heads}; expected a multiple of {kv_heads}={a.num_kv_heads}")
    if a.top_k > a.num_experts:
        raise document.error(top_k, f"is {a.top_k}; expected at most {experts}={a.num_experts}")
    if a.head_dim % 2:
        raise document.error("head_dim", f"is {a.head_dim}; expected an even number, as rotary embeddings need")


def stored_dtype(config: JsonDocument, default_dtype: StoredDtype) -> StoredDtype:
    """What it says that the model is meant to run in."""
    key = "dtype" if config.has("dtype") else "torch_dtype"
    if not config.has(key):
        return default_dtype
    name = str(config.values[key]).removeprefix("torch.")
    if name not in get_args(StoredDtype):
        raise config.error(key, f"is {name!r}; expected one of {', '.join(get_args(StoredDtype))}")
    return cast(StoredDtype, name)


def _number_in_quotes(text: str) -> int | str:
    """Early params.json files hold "4096"."""
    return int(text) if text.isdecimal() and len(text) < 12 else text


def _one_of_types() -> str:
    return " or ".join(repr(name) for name in FAMILIES)
