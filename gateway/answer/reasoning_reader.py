"""Splits an output's text into reasoning and answer. Knows tags; knows no streams and no calls.

    <think>\nSix times seven.\n</think>\n\nForty-two.        reasoning: Six times seven.   answer: Forty-two.

The tags go, and so do the line breaks beside them: templates put both back. All other text is in one of the two,
wherever a token cuts it, and whether the reasoning ends or not. A tag that comes later is text.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cluster.messages import ReasoningTags
from gateway.text.reasoning import Stage


class Split(NamedTuple):
    """More of an output."""

    reasoning: str
    answer: str


class ReasoningReader:
    """`push` each token and its text, then `flush`."""

    def __init__(self, tags: ReasoningTags, stage: Stage = "may come") -> None:
        self.num_tokens = 0  # of the reasoning and its tags
        self._tags = tags
        self._has_begun = stage == "has begun"  # with or without a tag in the output
        self._part: Literal["undecided", "reasoning", "answer"] = "answer" if stage == "is over" else "undecided"
        self._num_undecided = 0  # tokens
        self._blanks = ""  # undecided: before all else
        self._held = ""  # part of a tag: undecided, of the one that begins the reasoning, in it of the one that ends it
        self._num_breaks = 0  # in the reasoning, before what is held: line breaks that may be the tag's
        self._is_after_tag = False  # so line breaks are the tag's

    @property
    def is_over(self) -> bool:
        """Whether the answer has begun."""
        return self._part == "answer"

    def is_tag(self, token_id: int) -> bool:
        """Whether the token is a tag by itself, so that the text before it is complete."""
        return token_id in (self._tags.begin_id, self._tags.end_id)

    def push(self, token_id: int, text: str) -> Split:
        """The parts of `text`, as far as they are decided. A tag that is a token comes after its text; -1 is none."""
        was = self._part
        reasoning, answer = self._read(text)
        if token_id == self._tags.begin_id and self._part == "undecided":
            self._begin()
        elif token_id == self._tags.end_id and self._has_begun and self._part != "answer":
            self._end()
        if was != "answer" and token_id >= 0:
            self._num_undecided += 1
            if self._has_begun:
                self.num_tokens += self._num_undecided
                self._num_undecided = 0
        return Split(reasoning, answer)

    def flush(self) -> Split:
        """What was held back, once nothing follows."""
        held = self._blanks + "\n" * self._num_breaks + self._held
        self._blanks, self._held, self._num_breaks = "", "", 0
        return Split(held, "") if self._has_begun and self._part != "answer" else Split("", held)

    def _read(self, text: str) -> Split:
        if self._part == "answer":
            return Split("", self._after_tag(text))
        return self._undecided(text) if self._part == "undecided" else self._reasoning(text)

    def _undecided(self, text: str) -> Split:
        tag, is_text = self._tags.begin, self._tags.begin_id is None
        said = self._held + (text if self._held else text.lstrip(" \n"))  # not of all blanks so far, which may be many
        self._blanks += text[: len(self._held) + len(text) - len(said)]
        if is_text and said.startswith(tag):
            self._begin()
            return self._reasoning(said.removeprefix(tag))
        if not said or (is_text and tag.startswith(said)):
            self._held = said
            return Split("", "")
        held, self._blanks, self._held = self._blanks + said, "", ""
        if self._has_begun:
            self._begin()
            return self._reasoning(held)
        self._part = "answer"
        return Split("", held)

    def _begin(self) -> None:
        self._part, self._has_begun, self._is_after_tag = "reasoning", True, True
        self._blanks, self._held = "", ""

    def _end(self) -> None:
        self._part, self._held, self._num_breaks, self._is_after_tag = "answer", "", 0, True

    def _reasoning(self, text: str) -> Split:
        if self._tags.end_id is not None:
            return Split(self._thought(text), "")
        thought, end, answer = (self._held + text).partition(self._tags.end)
        if end:
            thought = self._thought(thought)
            self._end()
            return Split(thought, self._after_tag(answer))
        num_held = num_begun(self._tags.end, thought)
        self._held = thought[len(thought) - num_held :]
        return Split(self._thought(thought[: len(thought) - num_held]), "")

    def _thought(self, text: str) -> str:
        """The same without line breaks beside tags, as far as they are known."""
        text = self._after_tag(text)
        own = text.rstrip("\n")
        if not own:
            self._num_breaks += len(text)
            return ""
        breaks, self._num_breaks = self._num_breaks, len(text) - len(own)
        return "\n" * breaks + own

    def _after_tag(self, text: str) -> str:
        if self._is_after_tag:
            text = text.lstrip("\n")
            self._is_after_tag = not text
        return text


def num_begun(tag: str, text: str) -> int:
    """How many characters at the end of a text the tag begins with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
