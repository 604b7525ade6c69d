"""The bytes that each token of a checkpoint stands for. Knows tokenizer files; encodes no text and knows no model.

Two spellings occur: SentencePiece's (`▁` is a space, `<0xE4>` a byte) and GPT-2's byte-level alphabet, in which every
byte has a printable stand-in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """Every token's bytes, by id; those of special tokens are empty, for they never stand for text."""

    token_bytes: tuple[bytes, ...]
    special_ids: frozenset[int]


def read_vocabulary(directory: Path, layout: Literal["huggingface", "mistral"]) -> Vocabulary:
    """The vocabulary of a checkpoint directory. Raises CheckpointError when it has no tokenizer file."""
    return _read_mistral(directory) if layout == "mistral" else _read_huggingface(directory)


def tokenizer_file(directory: Path) -> Path:
    """The tokenizer of Mistral's own layout. Raises CheckpointError."""
    files = [*sorted(directory.glob("tekken*.json")), *sorted(directory.glob("*.model*"))]
    if not files:
        raise CheckpointError(f"{directory} has neither tekken.json nor tokenizer.model")
    return files[0]


def piece_bytes(piece: str) -> bytes:
    """SentencePiece's spelling: `<0xE4>` is a byte, `▁` a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: the printable ones are themselves, the rest follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def is_byte_level(rust_tokenizer: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` spells its tokens in the byte-level alphabet."""
    return '"ByteLevel"' in json.dumps(json.loads(rust_tokenizer.to_str()).get("decoder"))


def _read_huggingface(directory: Path) -> Vocabulary:
    from tokenizers import Tokenizer  # slow to import

    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json")
    rust = Tokenizer.from_file(str(directory / "tokenizer.json"))
    special_ids = frozenset(i for i, token in rust.get_added_tokens_decoder().items() if token.special)
    added = set(rust.get_added_tokens_decoder())
    byte_of = byte_level_alphabet() if is_byte_level(rust) else None
    vocabulary = rust.get_vocab(with_added_tokens=True)
    token_bytes = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in special_ids:
            continue
        if byte_of is None:
            token_bytes[token_id] = piece_bytes(token)
        elif token_id in added:  # spelled as it is
            token_bytes[token_id] = token.encode()
        else:
            token_bytes[token_id] = bytes(byte_of.get(char, 0x3F) for char in token)
    return Vocabulary(tuple(token_bytes), special_ids)


def _read_mistral(directory: Path) -> Vocabulary:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    raw: Any = MistralTokenizer.from_file(str(tokenizer_file(directory))).instruct_tokenizer.tokenizer
    special_ids = frozenset(int(i) for i in raw.special_ids)
    spell = raw.id_to_byte_piece if hasattr(raw, "id_to_byte_piece") else lambda i: piece_bytes(raw.id_to_piece(i))
    return Vocabulary(tuple(b"" if i in special_ids else bytes(spell(i)) for i in range(raw.n_words)), special_ids)
