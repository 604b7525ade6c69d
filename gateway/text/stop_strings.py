"""Cuts the text of one output at its first stop string. Knows pieces of text; knows nothing of tokens.

Text that may be the beginning of a stop string is held back until the next pieces decide. Libraries that stop at
strings do so where tokens are chosen, over tokens; what a client must not see is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """`push` pieces; once `is_stopped`, what was before the stop string is sent, and the rest never is."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._begun = [0] * len(self._stop)  # how much of each the text ends with, but for a whole one
        self._held = ""
        self._stopped: str | None = None  # the stop string that ended the output

    def is_stopped(self) -> bool:
        return self._stopped is not None

    @property
    def found(self) -> str | None:
        """The stop string that ended the output."""
        return self._stopped

    def push(self, piece: str) -> str:
        """The text that can be sent now. The earliest match wins; of two at one place, the first listed."""
        if not self._stop:
            return piece
        if self._stopped is not None:
            return ""
        text = self._held + piece
        # A match that a longer, earlier one could still overtake has to wait: "bc" must not win over "abcd" in "abc".
        undecided = len(text) - self._undecided(piece)
        at, found = min(((i, stop) for stop in self._stop if (i := text.find(stop)) >= 0), default=(-1, None), key=_at)
        if found is not None and at <= undecided:
            self._stopped, self._held = found, ""
            return text[:at]
        self._held = text[undecided:]
        return text[:undecided]

    def flush(self) -> str:
        """What was held back, when the output ended otherwise; a match in it still cuts."""
        text, self._held = self._held, ""
        at, found = min(((i, stop) for stop in self._stop if (i := text.find(stop)) >= 0), default=(-1, None), key=_at)
        if found is not None:
            self._stopped = found
            return text[:at]
        return text

    def _undecided(self, piece: str) -> int:
        """How long the longest suffix of the text is, which goes on with `piece`, that is a proper prefix of a stop.

        As Knuth, Morris and Pratt do it: a character costs the same, however long the stop strings are.
        """
        for i, stop in enumerate(self._stop):
            borders, begun = _borders(stop), self._begun[i]
            for char in piece:
                while begun and char != stop[begun]:
                    begun = borders[begun]
                begun += char == stop[begun]
                if begun == len(stop):
                    begun = borders[begun]
            self._begun[i] = begun
        return max(self._begun, default=0)


@lru_cache(maxsize=1024)
def _borders(text: str) -> tuple[int, ...]:
    """For each length of a prefix, how long the longest proper prefix is that it ends with."""
    borders = [0, 0]
    for char in text[1:]:
        border = borders[-1]
        while border and char != text[border]:
            border = borders[border]
        borders.append(border + (char == text[border]))
    return tuple(borders)


def _at(match: tuple[int, str]) -> int:
    return match[0]
