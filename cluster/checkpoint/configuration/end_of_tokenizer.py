"""Which token ends a sequence to a tokenizer, for models whose own files do not say. Encodes no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.checkpoint.json_document import JsonDocument
from cluster.errors import CheckpointError


def end_of_tokenizer(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The id of `eos_token` of tokenizer_config.json; empty: there is none, or it is no token of the model.

    Raises CheckpointError for a file that is no JSON, or is no tokenizer.
    """
    config, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not (config.is_file() and tokenizer.is_file()):
        return ()
    told = JsonDocument.read(config).values.get("eos_token")
    token = told.get("content") if isinstance(told, dict) else told
    if not isinstance(token, str):
        return ()
    token_id = _ids(JsonDocument.read(tokenizer)).get(token)
    return (token_id,) if isinstance(token_id, int) and 0 <= token_id < vocab_size else ()


def _ids(tokenizer: JsonDocument) -> dict[str, Any]:
    vocabulary = tokenizer.section("model").values.get("vocab")  # a list, where scores stand beside tokens
    added = tokenizer.values.get("added_tokens") or []
    try:
        if isinstance(vocabulary, list):
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        return (vocabulary or {}) | {one["content"]: one["id"] for one in added}
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{tokenizer.file} is no tokenizer: its tokens have no ids ({error!r}).") from error
