"""Encodes a rendered chat so that only the template's own control tokens are such: the same words of a caller are text.

Knows a `tokenizers.Tokenizer`; knows no templates and no messages.

A chat without forged control tokens, which nearly every chat is, gets the ids that the tokenizer itself gives it. Else
a copy of the tokenizer encodes it, in which control tokens are spelled in noncharacters of Unicode. The template's own
are spelled so in the text as well; a caller's `</s>` stays as it is and meets no such token. It is one text for
normalizer, pre-tokenizer and merges, as it would be otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from os.path import commonprefix
from typing import Any

from cluster.errors import InvalidRequest
from gateway.text.unlocked_tokenizer import UnlockedTokenizer

Span = tuple[int, int]

_FENCE = [chr(0xFDD0 + i) for i in range(0x20)]  # noncharacters, "not for interchange": digits, and a sign before them
_FENCES = re.compile(f"[{_FENCE[0]}-{_FENCE[-1]}]")
_PIECE = 2**16  # characters that are searched before other threads get their turn


class ControlTokens:
    """The special and added tokens of one tokenizer, but for runs of spaces, which are text to their models."""

    def __init__(self, rust: Any) -> None:
        self._rust = rust
        added = rust.get_added_tokens_decoder()
        self._text_of: dict[int, str] = {
            i: token.content for i, token in added.items() if _says_something(token.content)
        }
        self._id_of = {text: i for i, text in self._text_of.items()}
        self._any = re.compile(_any_of(self._id_of)) if self._id_of else None
        self._longest = max(map(len, self._id_of), default=0)
        document = json.loads(rust.to_str())
        model = document["model"]
        self._unk_id: int | None = model.get("unk_id", rust.token_to_id(model.get("unk_token") or ""))
        self._fenced = _fenced(document, self._text_of)

    @property
    def texts(self) -> frozenset[str]:
        """How they are spelled."""
        return frozenset(self._id_of)

    def encode(self, text: str, own: Sequence[Span]) -> list[int]:
        """Token ids of `text`, in which the control tokens at `own` are the only ones."""
        encoding = self._rust.encode(text, add_special_tokens=False)
        if self._spans(text, encoding) <= set(own):
            return list(encoding.ids)
        return self._encode_fenced(text, own)

    def refuse(self, value: Any, path: str) -> None:
        """For templates whose own words cannot be told: raises InvalidRequest where a text holds a control token's."""
        if isinstance(value, dict):
            for key, item in value.items():
                self.refuse([key, item], path)
        elif isinstance(value, list):
            for item in value:
                self.refuse(item, path)
        elif isinstance(value, str) and self._any is not None:
            for start in range(0, len(value), _PIECE):
                found = self._any.search(value, start, start + _PIECE + self._longest)
                if found:
                    raise InvalidRequest(f"{path}: this model cannot be sent a text that holds {found[0]!r}", path)

    def _spans(self, text: str, encoding: Any) -> set[Span]:
        """Where the tokenizer found control tokens in the text."""
        spans = set()
        for i, token_id in enumerate(encoding.ids):
            if token_id not in self._text_of:
                continue
            start, end = encoding.token_to_chars(i)
            found = text[start:end]
            if token_id == self._unk_id and found.strip() != self._text_of[token_id]:
                continue  # a text that the model has no piece for
            start += len(found) - len(found.lstrip())  # some take the spaces beside them along
            spans.add((start, start + len(found.strip())))
        return spans

    def _encode_fenced(self, text: str, own: Sequence[Span]) -> list[int]:
        pieces: list[str] = []
        starts: dict[int, Span] = {}  # of the fenced tokens, in the text that is made of the pieces
        size = at = 0
        for start, end in own:
            pieces += [_FENCES.sub("\ufffd", text[at:start]), _fence(self._id_of[text[start:end]])]
            size += len(pieces[-2])
            starts[size] = (start, end)
            size += len(pieces[-1])
            at = end
        fenced = "".join(pieces) + _FENCES.sub("\ufffd", text[at:])
        encoding = self._fenced.encode(fenced, add_special_tokens=False)
        found = {start for start, _ in self._spans(fenced, encoding)}
        if found >= starts.keys():
            return list(encoding.ids)
        # The others are none to the tokenizer, for what stands beside them.
        return self._encode_fenced(text, [span for start, span in starts.items() if start in found])


def _any_of(texts: Collection[str]) -> str:
    """A pattern for any of these texts, that tries hardly more than one at a place: their beginnings are shared."""
    start = commonprefix(list(texts))  # noqa: RUF071  # of characters, as is meant
    rests = {text[len(start) :] for text in texts}
    if "" in rests:  # one of the texts; what goes on from here holds it
        return re.escape(start)
    by_first: dict[str, list[str]] = {}
    for rest in sorted(rests):
        by_first.setdefault(rest[0], []).append(rest)
    return re.escape(start) + "(?:" + "|".join(map(_any_of, by_first.values())) + ")"


def _says_something(text: str) -> bool:
    return bool(text.replace("▁", " ").strip())


def _fence(token_id: int) -> str:
    return _FENCE[16] + "".join(_FENCE[int(digit, 16)] for digit in f"{token_id:08x}")


def _fenced(document: dict[str, Any], text_of: dict[int, str]) -> UnlockedTokenizer:
    """The same tokenizer with its control tokens spelled in noncharacters: nothing else stands for them."""
    from tokenizers import Tokenizer

    fence_of = {text: _fence(i) for i, text in text_of.items()}
    document["post_processor"] = None
    for token in document["added_tokens"]:
        token["content"] = fence_of.get(token["content"], token["content"])
    model = document["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {fence_of.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[fence_of.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not fence_of.keys() & {*pair, "".join(pair)}]
    if "unk_token" in model:
        model["unk_token"] = fence_of.get(model["unk_token"], model["unk_token"])
    fenced = Tokenizer.from_str(json.dumps(document))
    assert all(fenced.token_to_id(fence_of[text]) == i for i, text in text_of.items())
    return UnlockedTokenizer(fenced)
