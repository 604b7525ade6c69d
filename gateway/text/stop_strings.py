"""Cuts the text of one output at its first stop string. Knows pieces of text; knows nothing of tokens.

Text that may be the beginning of a stop string is held back until the next pieces decide.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """`push` pieces; once `is_stopped`, what was before the stop string is sent, and the rest never is."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._stopped: str | None = None  # the stop string that ended the output

    def is_stopped(self) -> bool:
        return self._stopped is not None

    def push(self, piece: str) -> str:
        """The text that can be sent now. The earliest match wins; of two at one place, the first listed."""
        if not self._stop:
            return piece
        if self._stopped is not None:
            return ""
        text = self._held + piece
        # A match that a longer, earlier one could still overtake has to wait: "bc" must not win over "abcd" in "abc".
        undecided = self._undecided(text)
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

    def _undecided(self, text: str) -> int:
        """Where the longest suffix of `text` starts that is a proper prefix of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return len(text) - longest


def _at(match: tuple[int, str]) -> int:
    return match[0]
