"""The vocabulary as xgrammar sees it. Knows token bytes and ends of sequence; knows nothing of schemas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.checkpoint.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarCompiler, TokenizerInfo


@dataclass(frozen=True)
class GrammarVocabulary:
    """Where the vocabulary of a model is, and what the model makes of it."""

    directory: str
    layout: Literal["huggingface", "mistral"]
    vocab_size: int  # of the logits; ids beyond the tokenizer's are never allowed
    eos_token_ids: tuple[int, ...]

    def tokenizer_info(self) -> TokenizerInfo:
        """Read the tokenizer's files. Raises CheckpointError."""
        from xgrammar import TokenizerInfo, VocabType  # slow to import

        vocabulary = read_vocabulary(Path(self.directory), self.layout)
        spelled: list[bytes] = [b""] * self.vocab_size
        spelled[: len(vocabulary.token_bytes)] = vocabulary.token_bytes[: self.vocab_size]
        for token_id in vocabulary.special_ids - set(self.eos_token_ids):
            if token_id < self.vocab_size:
                spelled[token_id] = b"\xff%d" % token_id  # never text, but a grammar can name the id
        return TokenizerInfo(spelled, VocabType.RAW, stop_token_ids=list(self.eos_token_ids))


def new_compiler(info: TokenizerInfo) -> GrammarCompiler:
    """One thread, no cache: both are bounded by whoever owns it."""
    from xgrammar import GrammarCompiler

    return GrammarCompiler(info, max_threads=1, cache_enabled=False)


def compile_tag(compiler: GrammarCompiler, tag: str) -> CompiledGrammar:
    """Compile a structural tag. Raises ValueError, or MemoryError.

    xgrammar's own words are of what we spelled, with names and places that no client wrote; no client reads them.
    """
    try:
        return compiler.compile_structural_tag(tag)
    except (RuntimeError, ValueError, TypeError) as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        raise ValueError("no grammar can be made of it") from error
