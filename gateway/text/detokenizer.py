"""Token ids of one output to pieces of text, as they come. Never splits a character; knows nothing of stop strings.

Only a short window of ids is decoded again for each token, so a token costs the same at any length:

    ids      … a  b  c │ d  e        window = [b, c, d, e]: from the ids of the last finished piece on
    text     … ───────▶│ held back   sent = characters of decode(window) that went out already

A window that decodes to a trailing U+FFFD may end inside a character, so those are held back until the next token.

`tokenizers.DecodeStream` will not do: it has no flush, so an output that ends inside a character loses its end; bytes
that are no text cost it the square of their number; and mistral-common's tokenizers are none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_WINDOW = 32  # ids; a character has at most 4 bytes, so what is held back longer is no character


class Detokenizer:
    """`push` ids one by one, then `flush`: the pieces joined are the text of the whole output."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: ids before the output whose text the output continues (a raw prompt), for its leading space."""
        self._tokenizer = tokenizer
        self._window: list[int] = [i for i in context if self._has_text(i)][-4:]
        self._num_finished = len(self._window)  # ids of the window whose text is all sent
        self._sent = len(tokenizer.decode(self._window)) if self._window else 0  # characters

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete, and for special tokens."""
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        certain = len(text)
        while certain > self._sent and text[certain - 1] == REPLACEMENT:
            certain -= 1
        piece = text[self._sent : certain]
        if certain == len(text) and piece:
            self._trim(self._num_finished)
        elif len(self._window) > MAX_WINDOW:
            piece = text[self._sent :]
            self._trim(len(self._window) - 1)
        else:
            self._sent = max(self._sent, certain)
        return piece

    def flush(self) -> str:
        """What was held back: the output ended inside a character."""
        text = self._tokenizer.decode(self._window) if self._window else ""
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _trim(self, start: int) -> None:
        self._window = self._window[start:]
        self._num_finished = len(self._window)
        self._sent = len(self._tokenizer.decode(self._window))

    def _has_text(self, token_id: int) -> bool:
        return 0 <= token_id < self._tokenizer.vocab_size and token_id not in self._tokenizer.special_ids


def detokenize(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a whole output, without special tokens."""
    return tokenizer.decode([i for i in token_ids if i < tokenizer.vocab_size and i not in tokenizer.special_ids])
