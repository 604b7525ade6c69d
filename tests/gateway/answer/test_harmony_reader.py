"""gpt-oss's messages: each is reasoning, text or a call, wherever tokens cut it and whatever a model writes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import GatewayConfig
from cluster.errors import CheckpointError
from cluster.messages import HarmonyGrammar, HarmonyTokens, Parsers
from gateway.answer.calls import joined
from gateway.answer.harmony_reader import HarmonyReader
from gateway.request.protocol import ChatCompletionRequest, parse_body
from gateway.request.validator import Validator
from gateway.text.tokenizer import HuggingFaceTokenizer
from gateway.text.tokenizer_files import load_tokenizer
from tests.gateway.chat_formats import GPT_OSS, HARMONY, write_gpt_oss
from tests.gateway.doubles import model_card, write_tokenizer

IDS = {name: i for i, name in enumerate(("start", "channel", "message", "constrain", "end", "call"), start=7)}
TOKENS = HarmonyTokens(**IDS)
Piece = int | str  # a mark, or text


def read(pieces: list[Piece], *, in_answer: bool = False) -> tuple[str, str, list[tuple[str, str]], int]:
    """Reasoning, text, calls, and how many tokens were reasoning."""
    reader = HarmonyReader(TOKENS, frozenset({"f", "g.h"}), in_answer=in_answer)
    splits = [reader.push(*((100, one) if isinstance(one, str) else (one, ""))) for one in pieces]
    splits.append(reader.flush())
    reader.tool_calls.flush(has_ended=True)
    calls = [(call.name, call.arguments) for call in joined(reader.tool_calls.calls.take())]
    return "".join(one.reasoning for one in splits), "".join(one.answer for one in splits), calls, reader.num_tokens


def marked(text: str) -> list[Piece]:
    """Text in which `<end>` is a mark."""
    pieces: list[Piece] = []
    for part in text.replace("<", "\0<").replace(">", ">\0").split("\0"):
        pieces += [IDS[part[1:-1]]] if part[1:-1] in IDS and part[:1] == "<" else [part] if part else []
    return pieces


NEXT = "<start>assistant<channel>"
THOUGHT = "<channel>analysis<message>Hm.<end><start>assistant"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (f"{THOUGHT}<channel>final<message>42", ("Hm.", "42", [], 7 - 1)),
        (f"{THOUGHT}{THOUGHT}<channel>final<message>42", ("Hm.\nHm.", "42", [], 5 + 7)),
        (f'{THOUGHT}<channel>commentary to=functions.f <constrain>json<message>{{"a": 1}}<call>', None),
        ("<channel>commentary to=g.h json<message>{}", ("", "", [("g.h", "{}")], 0)),
        (
            "<channel>commentary<message>I look.<end><start>assistant<channel>final<message>42",
            ("", "I look.\n42", [], 0),
        ),
        ("<channel>commentary to=python code<message>print(1)", ("", "print(1)", [], 0)),
        ("<channel>analysis to=python code<message>print(1)", ("", "print(1)", [], 0)),
        ("<channel>mood<message>Well.", ("", "Well.", [], 0)),
        ("<message>Well.", ("", "Well.", [], 0)),
        ("Well.<end>", ("", "Well.", [], 0)),
        (" to", ("", "", [], 0)),
        ("<channel>anal", ("", "", [], 0)),
        ("<channel>" + "x" * 300, ("", " <channel> " + "x" * 300, [], 0)),
        ("<end><end><call><message><message><constrain>", ("", "", [], 0)),
        ("", ("", "", [], 0)),
    ],
)
def test_a_message_is_what_its_header_says(written: str, expected: object) -> None:
    reasoning, text, calls, num_tokens = read(marked(written))
    if expected is None:
        assert (reasoning, text, calls) == ("Hm.", "", [("f", '{"a": 1}')])
        return
    assert (reasoning, text, calls) == expected[:3]  # type: ignore[index]
    assert (num_tokens > 0) == bool(reasoning)


def test_tokens_of_reasoning_are_its_text_and_the_marks_around_it() -> None:
    assert read(marked(f"{THOUGHT}<channel>final<message>42"))[3] == 5
    assert read(marked("<channel>analysis<message>Hm."))[3] == 4


def test_an_answer_that_is_continued_has_begun() -> None:
    assert read([" and more", IDS["end"]], in_answer=True) == ("", " and more", [], 0)


PIECES = st.one_of(
    st.sampled_from(list(IDS.values())),
    st.sampled_from(
        ["analysis", "final", "commentary to=functions.f ", " to=g.h", "json", "assistant", '{"a": 1}', " ", "Hm"]
    ),
)


@given(pieces=st.lists(PIECES, max_size=16), cuts=st.sets(st.integers(1, 20), max_size=6))
def test_where_tokens_cut_a_message_changes_nothing(pieces: list[Piece], cuts: set[int]) -> None:
    """And nothing that a model may write raises."""
    cut: list[Piece] = []
    for piece in pieces:
        at = [0, *sorted(i for i in cuts if isinstance(piece, str) and i < len(piece))]
        cut += [piece[a:b] for a, b in pairwise([*at, len(piece)])] if isinstance(piece, str) else [piece]
    merged: list[Piece] = []
    for piece in pieces:
        if merged and isinstance(piece, str) and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    assert read(cut)[:3] == read(merged)[:3]


def test_the_vocabulary_has_the_marks_or_harmony_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gpt_oss(tmp_path / "gpt"), "huggingface", 400)
    assert tokenizer.reasoning is not None
    assert (type(tokenizer.reasoning.tags), tokenizer.tool_tokens.format) == (HarmonyTokens, "openai")
    unmarked = write_tokenizer(tmp_path / "unmarked", chat_template=GPT_OSS, special=HARMONY[:3])
    for parsers in (Parsers(reasoning="openai_gptoss"), Parsers(tools="openai")):
        with pytest.raises(CheckpointError, match="harmony needs special tokens"):
            load_tokenizer(unmarked, "huggingface", 400, parsers)
    plain = load_tokenizer(unmarked, "huggingface", 400)
    assert (plain.reasoning, plain.tool_tokens.format) == (None, "mistral")
    small = load_tokenizer(tmp_path / "gpt", "huggingface", 318)
    assert (small.reasoning, small.tool_tokens.format) == (None, "mistral")


def test_effort_and_form_reach_gpt_oss(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(write_gpt_oss(tmp_path))
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "reasoning_effort": "high",
        "response_format": {"type": "json_object"},
    }
    validator = Validator(model_card(tmp_path, vocab_size=400), tokenizer, GatewayConfig())
    [request] = validator.chat(parse_body(ChatCompletionRequest, body, 0)).requests
    assert "Reasoning: high" in tokenizer.decode(request.prompt_token_ids)
    assert isinstance(request.grammar, HarmonyGrammar)
    assert request.grammar.answer.param == "response_format"  # type: ignore[union-attr]
