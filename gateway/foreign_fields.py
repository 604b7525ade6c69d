"""Fields of other features and of other servers: which are ignored, and which are refused. Knows names and values only.

A field is ignored where the answer is as good without it, and refused where ignoring it would change what was asked.
Any other unknown field is ignored.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from cluster.errors import InvalidRequest

# Ignored, whatever their value: bookkeeping, billing, caching, hints to models of other kinds.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_mode",
        "reasoning_effort",
        "verbosity",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "include_reasoning",
        "spaces_between_special_tokens",
        "priority",
        "request_id",
    }
)

# Refused, but for the values that ask for nothing; null always asks for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": ([],),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "cache_salt": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "kv_transfer_params": (),
}

REFUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "prefix": (False,),  # Mistral's: an answer's beginning, to be continued
    "audio": (),
    "function_call": (),
}


def refuse_foreign(document: Mapping[str, Any], known: Container[str]) -> None:
    """Raises InvalidRequest for the first field, not of `known` ones, that asks for what is not served."""
    for name, value in document.items():
        if name not in known:
            _refuse(name, value, REFUSED, name)


def refuse_in_message(unknown: Mapping[str, Any], path: str) -> None:
    """The same for the fields of one message, whose `path` it names."""
    for name, value in unknown.items():
        _refuse(name, value, REFUSED_IN_MESSAGE, f"{path}.{name}")


def _refuse(name: str, value: Any, refused: Mapping[str, tuple[Any, ...]], path: str) -> None:
    harmless = refused.get(name)
    if harmless is None or value is None or any(value == one and type(value) is type(one) for one in harmless):
        return
    raise InvalidRequest(f"{path}: not supported by this server", param=path)
