"""Which keys of `config.json` and `params.json` say nothing that a forward pass depends on, and which may say one thing
only, whatever the family. Knows names; what the other keys mean is read in `cluster.checkpoint.families`.

What is not listed here may change every number that a model computes, so it is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.checkpoint.families.family import Family
from cluster.checkpoint.json_document import JsonDocument, names

_OF_EVERY_CONFIG = names(  # what transformers writes or once wrote, whatever the model
    "_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _from_model_config",
    "_name_or_path architectures attn_implementation chunk_size_feed_forward dtype finetuning_task id2label is_decoder",
    "label2id model_type name_or_path num_labels output_attentions output_hidden_states output_past prefix",
    "problem_type quantization_config return_dict task_specific_params tf_legacy_loss tokenizer_class torch_dtype",
    "torchscript transformers.js_config transformers_version use_bfloat16 use_cache",
)
_OF_TOKENS = names("bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id")
_OF_GENERATION = names(  # in configs from before generation_config.json; transformers 5 drops them
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens",
    "min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores",
    "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p",
    "typical_p",
)
_OF_TRAINING = names(
    "attention_dropout embd_pdrop gradient_checkpointing hidden_dropout initializer_range max_sequence_length",
    "model_max_length pretraining_tp resid_pdrop unsloth_fixed unsloth_version use_flash_attention_2",
)
_OF_THE_MODEL = names(
    "head_dim hidden_act hidden_size intermediate_size layer_types max_position_embeddings num_attention_heads",
    "num_hidden_layers num_key_value_heads original_max_position_embeddings rms_norm_eps rope_parameters rope_scaling",
    "rope_theta sliding_window tie_word_embeddings use_sliding_window vocab_size",
)
_OF_ANY_FAMILY = _OF_EVERY_CONFIG | _OF_TOKENS | _OF_GENERATION | _OF_TRAINING | _OF_THE_MODEL
_ONE_VALUE: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}

_PARAMS = names(
    "dim head_dim hidden_dim max_batch_size max_position_embeddings max_seq_len model_type moe n_heads n_kv_heads",
    "n_layers norm_eps rope_theta sliding_window tied_embeddings vocab_size",
)
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
_PARAMS_ONE_VALUE = {"causal": (True,)} | dict.fromkeys(
    names("llama_4_scaling lora multimodal quantization use_biases vision_encoder yarn"), _NOTHING
)
_MOE = names("num_experts num_experts_per_tok")


def check_config(config: JsonDocument, family: Family) -> None:
    """Raises CheckpointError for a key of Hugging Face's that is not known, or known with another value."""
    one_value = {key: values for key, values in _ONE_VALUE.items() if key not in family.keys}
    config.check_keys(_OF_ANY_FAMILY | family.keys, {**one_value, **family.one_value})


def check_params(params: JsonDocument) -> None:
    """The same of Mistral's."""
    params.check_keys(_PARAMS, _PARAMS_ONE_VALUE)
    params.section("moe").check_keys(_MOE, {})
