"""What the authors of a model chose for its answers: `generation_config.json`. Knows its keys; samples nothing.

As with vLLM's `--generation-config auto`, it says what a request gets that does not say otherwise, whatever `do_sample`
is. How long an answer may be is the client's choice and the context's: `max_new_tokens` and the like say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.checkpoint.json_document import JsonDocument
from cluster.messages import MIN_REPETITION_PENALTY, SamplingDefaults

FILE = "generation_config.json"

_READ = frozenset(("eos_token_id", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"))
_SAY_NOTHING = frozenset(
    name
    for line in (  # of one answer that is sampled token by token
        "_commit_hash _from_model_config transformers_version do_sample max_length max_new_tokens max_time",
        "bos_token_id decoder_start_token_id pad_token_id output_attentions output_hidden_states output_logits",
        "output_scores return_dict_in_generate num_return_sequences renormalize_logits remove_invalid_values",
        "diversity_penalty early_stopping length_penalty low_memory",  # of beams, which `num_beams` asks for
        "cache_config cache_implementation compile_config continuous_batching_config disable_compile max_cache_len",
        "prefill_chunk_size use_cache",
        "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind",
        "is_assistant max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule",
        "prompt_lookup_num_tokens speculation_type target_lookbehind use_mtp",
    )
    for name in line.split()
)
_OFF_AT_ONE = frozenset(("encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams", "typical_p"))
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Of a model without the file: nothing."""

    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    eos_token_ids: tuple[int, ...] = ()
    not_followed: tuple[str, ...] = ()  # keys that would change answers if they were


def read_generation_config(directory: Path, vocab_size: int) -> GenerationConfig:
    """Raises CheckpointError, which names the file and the key, for a value that no request could have either."""
    file = directory / FILE
    if not file.exists():
        return GenerationConfig()
    document = JsonDocument.read(file)
    defaults = SamplingDefaults(
        temperature=_from_zero(document, "temperature", 1.0, 2.0),
        top_p=document.number("top_p", default=1.0, maximum=1.0),
        top_k=max(0, document.integer("top_k", default=0, minimum=-1)),
        min_p=_from_zero(document, "min_p", 0.0, 1.0),
        repetition_penalty=document.number(
            "repetition_penalty", default=1.0, minimum=MIN_REPETITION_PENALTY, maximum=10.0
        ),
    )
    not_followed = tuple(
        key
        for key, value in document.values.items()
        if key not in _READ | _SAY_NOTHING and value not in _OFF and not (key in _OFF_AT_ONE and value == 1)
    )
    return GenerationConfig(defaults, document.integers("eos_token_id", vocab_size - 1), not_followed)


def _from_zero(document: JsonDocument, key: str, default: float, maximum: float) -> float:
    value = document.values.get(key)
    if value is None:
        return default
    return 0.0 if value == 0 and not isinstance(value, bool) else document.number(key, maximum=maximum)
