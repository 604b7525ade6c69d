"""Loads the tokenizer of a checkpoint, and says by its file what would keep clients from being served. Knows files, ids
and how many of them a model has; encodes nothing for anybody.

A tokenizer may know tokens that the model has no embedding for: a pad token was added, say, and the embeddings never
resized. Where all of those were added, the model is served, and what holds one is refused request by request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from cluster.checkpoint.layouts import Layout
from cluster.checkpoint.vocabulary import tokenizer_file
from cluster.errors import CheckpointError, InvalidRequest
from cluster.messages import AUTO, Parsers, ToolTokens
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer, Tokenizer

logger = logging.getLogger(__name__)

_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SHOWN = 5  # tokens that a message names


def load_tokenizer(directory: Path, layout: Layout, num_embeddings: int, parsers: Parsers = AUTO) -> Tokenizer:
    """Raises CheckpointError, which names the file. What can be served in part is logged.

    `num_embeddings`: rows of the model's table of embeddings.
    """
    tokenizer = _load_mistral(directory, parsers) if layout == "mistral" else _load_huggingface(directory, parsers)
    spelled = tokenizer.tool_tokens
    calls, args, call_id, end = (
        None if token_id is None or token_id >= num_embeddings else token_id
        for token_id in (spelled.calls, spelled.args, spelled.call_id, spelled.end)
    )
    tokenizer.tool_tokens = replace(spelled, calls=calls, args=args, call_id=call_id, end=end)
    if tokenizer.reasoning is not None and max(tokenizer.reasoning.token_ids, default=0) >= num_embeddings:
        tokenizer.reasoning = None  # no answer can hold such a tag
        if spelled.format == "openai":
            tokenizer.tool_tokens = ToolTokens()
    chat = _least_chat(tokenizer, directory)
    if tokenizer.vocab_size > num_embeddings:
        _check_unembedded(tokenizer, chat, directory, num_embeddings)
    return tokenizer


def _load_huggingface(directory: Path, parsers: Parsers) -> HuggingFaceTokenizer:
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; other kinds of tokenizers are not read in this layout.")
    try:
        tokenizer = HuggingFaceTokenizer(directory, parsers)
        tokenizer.check_templates()
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{_template_file(directory)}: the chat template does not compile: line {error.lineno}: {error.message}"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers and tokenizers raise; the latter have no class of their own
        raise CheckpointError(_blame(directory, error)) from error
    return tokenizer


def _load_mistral(directory: Path, parsers: Parsers) -> MistralTokenizer:
    file = tokenizer_file(directory)
    try:
        return MistralTokenizer(directory, parsers)
    except CheckpointError:
        raise
    except Exception as error:  # of four libraries
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {_first_line(error)}") from error


def _blame(directory: Path, error: Exception) -> str:
    """Which file the loader's error is about, which seldom says."""
    from tokenizers import Tokenizer as RustTokenizer

    file = directory / "tokenizer.json"
    try:
        RustTokenizer.from_file(str(file))
    except Exception as reason:
        return f"{file} cannot be read as a tokenizer: {_first_line(reason)}"
    for file in (directory / name for name in _JSON_FILES):
        try:
            document = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, RecursionError) as reason:
            return f"{file} is not valid JSON: {_first_line(reason)}"
        if not isinstance(document, dict):
            return f"{file} is not a JSON object"
    return f"{directory}: its tokenizer cannot be set up as tokenizer_config.json says: {_first_line(error)}"


def _check_unembedded(tokenizer: Tokenizer, chat: Sequence[int], directory: Path, num_embeddings: int) -> None:
    """Raises CheckpointError where ordinary text, or every prompt, gets ids that the model has no embedding for."""
    if isinstance(tokenizer, MistralTokenizer):
        file, added = tokenizer_file(directory), dict[int, str]()
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), "there are two layouts"
        file, added = directory / "tokenizer.json", tokenizer.added_tokens
    sizes = f"the model has {num_embeddings} embeddings, for ids up to {num_embeddings - 1}"
    beyond = range(num_embeddings, tokenizer.vocab_size)
    if words := sum(token_id not in added for token_id in beyond if tokenizer.piece(token_id)):
        raise CheckpointError(
            f"{file} has {words} tokens with ids from {num_embeddings} on, and {sizes}: it is the tokenizer of another "
            "model, or the embeddings were not resized for it."
        )
    names = _names([f"{added[i]!r} ({i})" for i in beyond if i in added])
    for said, token_ids in (
        ("every prompt", tokenizer.encode("Hello")),
        (f"every chat by the template in {_template_file(directory)}", chat),
    ):
        if lost := [i for i in dict.fromkeys(token_ids) if i >= num_embeddings]:
            raise CheckpointError(
                f"{file}: {said} holds {_names([repr(added[i]) for i in lost])}, and {sizes}. "
                "Resize the model's embeddings, or take the tokens out."
            )
    logger.warning(
        "%s has %s, and %s: requests that use one are refused. Resize the model's embeddings to serve them, or take "
        "the tokens out of the file.",
        file,
        names,
        sizes,
    )


def _least_chat(tokenizer: Tokenizer, directory: Path) -> Sequence[int]:
    """Token ids of one message; none where there is no template, or it wants more."""
    try:
        return tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    except InvalidRequest as error:
        logger.warning("%s: a plain chat is refused: %s", directory, error.__cause__ or error.message)
        return ()


def _template_file(directory: Path) -> Path:
    file = directory / "chat_template.jinja"
    return file if file.is_file() else directory / "tokenizer_config.json"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
