"""What a model thought is told from what it answers, wherever tokens cut the text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import ReasoningTags
from gateway.answer.reasoning_reader import ReasoningReader
from gateway.text.reasoning import Stage

TAGS = ReasoningTags("<think>", "</think>")
SPECIAL = ReasoningTags("[THINK]", "[/THINK]", begin_id=7, end_id=8)
WORDS = ["<think>", "</think>", "<", "</", "think>", "\n", "\n\n", " ", "a", "Grüße", "<tool_call>", ""]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map("".join)


def read(pieces: list[str], stage: Stage = "may come") -> tuple[str, str, int]:
    """Reasoning, answer, and how many of the pieces were reasoning."""
    reader = ReasoningReader(TAGS, stage)
    splits = [reader.push(100 + i, piece) for i, piece in enumerate(pieces)]
    splits.append(reader.flush())
    return "".join(one.reasoning for one in splits), "".join(one.answer for one in splits), reader.num_tokens


def whole(text: str, stage: Stage) -> tuple[str, str]:
    """The same by one expression over the whole of it."""
    if stage == "is over":
        return "", text
    begun = re.match(r"[ \n]*<think>", text)
    if begun is None and stage == "may come":
        return "", text
    thought, end, answer = (text[begun.end() :] if begun else text).partition("</think>")
    if not end and not begun and not thought.strip(" \n"):
        return thought, ""  # nothing but blanks, of which nobody knows whose they are
    return thought.lstrip("\n").rstrip("\n" if end else ""), answer.lstrip("\n")


@given(text=TEXTS, stage=st.sampled_from(["may come", "has begun", "is over"]), data=st.data())
def test_where_tokens_cut_the_text_changes_nothing(text: str, stage: Stage, data: st.DataObject) -> None:
    """Nor is any of it lost or said twice: it is what one look at the whole text finds."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, stage)[:2] == whole(text, stage)


@pytest.mark.parametrize(
    ("pieces", "stage", "expected"),
    [
        (["<think>", "\n", "Hm", ".", "\n", "</think>", "\n\n", "42"], "may come", ("Hm.", "42", 6)),
        (["Hm", ".\n</thi", "nk>42"], "has begun", ("Hm.", "42", 3)),
        (["<think>", "Hm.</think>"], "has begun", ("Hm.", "", 2)),  # a tag although the prompt has it
        (["<think>", "\n\n", "</think>", "\n\n", "42"], "may come", ("", "42", 3)),
        (["42", "<think>", "no", "</think>"], "may come", ("", "42<think>no</think>", 0)),  # a tag that comes late
        (["<think>", "a", "<think>", "b", "</think>", "c", "</think>"], "may come", ("a<think>b", "c</think>", 5)),
        (["<think>", "cut\n"], "may come", ("cut\n", "", 2)),
        (["<think>", "cut</th"], "may come", ("cut</th", "", 2)),
        (["<thi"], "may come", ("", "<thi", 0)),
        (["\n", "<thinking>"], "may come", ("", "\n<thinking>", 0)),
        (["<think>no</think>"], "is over", ("", "<think>no</think>", 0)),
    ],
)
def test_tags_and_the_line_breaks_beside_them_go(pieces: list[str], stage: Stage, expected: object) -> None:
    assert read(pieces, stage) == expected


def test_tags_that_are_tokens_are_no_text() -> None:
    """As Mistral has them: the same words as text are text."""
    reader = ReasoningReader(SPECIAL)
    tokens = [(7, ""), (20, "So [/THINK] is"), (21, " it\n"), (8, ""), (22, "\n42 [THINK]"), (8, "")]
    splits = [reader.push(*token) for token in tokens]
    assert "".join(one.reasoning for one in splits) == "So [/THINK] is it"
    assert "".join(one.answer for one in splits) == "42 [THINK]"
    assert (reader.flush(), reader.num_tokens) == (("", ""), 4)


def test_a_million_line_breaks_are_held_for_nothing() -> None:
    """A reader that kept them as text would copy it with every token."""
    reader = ReasoningReader(TAGS, "has begun")
    assert reader.push(1, "a").reasoning == "a"
    for _ in range(1000):
        assert reader.push(2, "\n" * 1000) == ("", "")
    assert reader.push(3, "b").reasoning == "\n" * 1_000_000 + "b"


def test_blanks_without_end_are_not_read_over_with_every_token() -> None:
    """A caller may bias a model to write nothing else: 32,000 of them took the event loop 13 seconds."""
    reader, num = ReasoningReader(TAGS), 32_000
    started = time.thread_time()
    assert not any(any(reader.push(100, "    ")) for _ in range(num))
    assert time.thread_time() - started < 2
    assert reader.flush() == ("", "    " * num)
