"""Fields of other features and of other servers: which are ignored, and which are refused. Knows names and values only.

A field is ignored where the answer is as good without it, and refused where ignoring it would change what was asked.
Any other unknown field is ignored.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from cluster.errors import InvalidRequest

# Ignored, whatever their value: bookkeeping, billing, caching, scheduling, hints to models of other kinds, and the
# parameters of what is refused below where it is asked for.
IGNORED = frozenset(
    {
        *(
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "request_id",
            "rid",
            "session_id",
        ),
        *(
            "prompt_cache_key",
            "prompt_cache_retention",
            "cache_prompt",
            "id_slot",
            "extra_key",
            "keep_alive",
            "num_ctx",
        ),
        *("prompt_mode", "reasoning", "reasoning_format", "verbosity"),
        *("separate_reasoning", "stream_reasoning", "thinking_token_budget", "reasoning_budget_tokens"),
        *("spaces_between_special_tokens", "stream_interval", "timings_per_token", "guided_decoding_backend"),
        *("custom_labels", "routed_dp_rank", "data_parallel_rank", "backend_sampling", "speculative.n_max"),
        *("speculative.n_min", "speculative.p_min"),
        *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "adaptive_decay", "repeat_last_n"),
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    }
)

_NOTHING: tuple[Any, ...] = ({}, [], "", False)

# Refused, but for the values that ask for nothing; null always asks for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # What only other routes take, or ours of another name.
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "safe_prompt": (False,),
    "echo": (False,),
    "max_completion_tokens": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "min_new_tokens": (0,),
    "n_cmpl": (1,),
    "n_probs": (0,),
    "top_n_tokens": (0,),
    "stop_sequences": ([],),
    "return_tokens": (False,),
    "return_prompt_token_ids": (False,),
    "options": _NOTHING,
    "parameters": _NOTHING,
    "sampling_params": _NOTHING,
    "inputs": (),
    # OpenAI's and Mistral's.
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "guardrails": ([],),
    "suffix": ("",),
    "best_of": (1,),
    # How the prompt is made.
    "chat_template": _NOTHING,
    "add_special_tokens": (),
    "documents": ([],),
    "template": _NOTHING,
    "system": _NOTHING,
    "system_prompt": _NOTHING,
    "tool_prompt": _NOTHING,
    "guideline": _NOTHING,
    "raw": (False,),
    "context": ([],),
    "task": (),
    "input_ids": (),
    "input_prefix": ("",),
    "input_suffix": ("",),
    "input_extra": ([],),
    "prompt_embeds": (),
    # How vectors are told.
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "normalized": (True,),
    "use_activation": (True,),
    "pooling_type": (),
    "late_chunking": (False,),
    "images": ([],),
    "image_data": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "truncate": (False,),
    "n_keep": (0,),
    "n_discard": (0,),
    "cache_salt": (),
    # How tokens are chosen.
    "do_sample": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "repeat_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "top_a": (0,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "min_keep": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "adaptive_target": (-1,),
    "dry_multiplier": (0,),
    "samplers": ([],),
    "penalize_nl": (False,),
    "guidance_scale": (1,),
    "watermark": (False,),
    "watermarking": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "custom_params": ({},),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "lora": ([],),
    "lora_path": (),
    "adapter_id": (),
    # What an answer must look like.
    "structured_outputs": ({},),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "preserved_tokens": ([],),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "format": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_whitespace_pattern": (),
    "structural_tag": ("",),
    "n_indent": (0,),
    # Where it ends.
    "stop_regex": ([], ""),
    "t_max_predict_ms": (0, -1),
    # How it is told.
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "return_full_text": (False,),
    "response_fields": ([],),
    "logprob_token_ids": ([],),
    "post_sampling_probs": (False,),
    "details": (False,),
    "decoder_input_details": (False,),
    "return_prompt_text": (False,),
    "return_progress": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_cached_tokens_details": (False,),
    "routed_experts_prompt_start": (0,),
    "routed_experts_start_len": (0,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "session_params": ({},),
}

INSTEAD = {  # what does here what a refused field does elsewhere, or nearly
    **dict.fromkeys(("max_new_tokens", "max_output_tokens", "max_completion_tokens", "n_predict"), "max_tokens"),
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_cmpl": "n",
    "n_probs": "logprobs",
    "top_n_tokens": "logprobs",
    "stop_sequences": "stop",
    "return_tokens": "return_token_ids",
    "return_prompt_token_ids": "return_token_ids",
    "repeat_penalty": "repetition_penalty",
    "do_sample": "temperature",
    **dict.fromkeys(("embedding_type", "embedding_types", "embed_dtype"), "output_dtype"),
    **dict.fromkeys(("normalized", "use_activation"), "normalize"),
}

REFUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "images": ([],),  # Ollama's
    "tools": ([],),  # a system message's, SGLang's
}


def refuse_foreign(document: Mapping[str, Any], known: Container[str]) -> None:
    """Raises InvalidRequest for the first field, not of `known` ones, that asks for what is not served."""
    for name, value in document.items():
        if name not in known:
            _refuse(name, value, REFUSED, name)


def without_refused(document: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields that are none of `refused`, field → values that ask for nothing. Raises InvalidRequest for others."""
    for name in refused:
        _refuse(name, document.get(name), refused, name)
    return {name: value for name, value in document.items() if name not in refused}


def refuse_in_message(unknown: Mapping[str, Any], path: str) -> None:
    """The same for the fields of one message, whose `path` it names."""
    for name, value in unknown.items():
        _refuse(name, value, REFUSED_IN_MESSAGE, f"{path}.{name}")


def _refuse(name: str, value: Any, refused: Mapping[str, tuple[Any, ...]], path: str) -> None:
    harmless = refused.get(name)
    if harmless is None or value is None or any(_is(value, one) for one in harmless):
        return
    hint = f"; {INSTEAD[name]} is" if name in INSTEAD else ""
    raise InvalidRequest(f"{path}: not supported by this server{hint}", param=path)


def _is(value: Any, one: Any) -> bool:
    """1 and 1.0 are one value, 1 and true are not."""
    return bool(value == one) and isinstance(value, bool) == isinstance(one, bool)
