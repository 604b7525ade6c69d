"""Calls of tools as Hermes, Qwen and Llama 3 write them are read, and all else is text, wherever tokens cut it."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import JsonSchema, ToolCallGrammar, ToolTokens
from gateway.answer.calls import joined
from gateway.answer.json_call import call_head
from gateway.answer.tools_reader import tool_call_reader

ANY = JsonSchema("{}", "tools")
FORMATS = {
    "hermes": ToolTokens(format="hermes"),
    "hermes in tokens": ToolTokens(calls=7, end=8, format="hermes"),
    "llama3_json": ToolTokens(calls=9, format="llama3_json"),
}
TAGS = {"<tool_call>": 7, "</tool_call>": 8}
CALL = '{"name": "f", "arguments": {"a": "}]<\\"é"}}'
IN_TAGS = f"<tool_call>\n{CALL}\n</tool_call>"
PARAMETERS = '{"name": "f", "parameters": {"a": [{}]}}'
Read = tuple[str, list[tuple[str, str]], bool]


def read(tokens: ToolTokens, pieces: list[tuple[int, str]], *, has_ended: bool = True) -> Read:
    """Text, calls, and whether all of them are complete."""
    reader = tool_call_reader(ToolCallGrammar((("f", ANY), ("g", ANY)), required=False, tokens=tokens))
    text, calls = "", []
    for token_id, piece in pieces:
        text += reader.push(token_id, piece)
        calls += reader.calls.take()
    text += reader.flush(has_ended=has_ended)
    calls += reader.calls.take()
    return text, [(call.name, call.arguments) for call in joined(calls)], reader.is_complete


def cut(text: str, cuts: set[int]) -> list[tuple[int, str]]:
    at = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    return [(100, text[start:end]) for start, end in pairwise(at)]


ARGUMENTS = '{"a": "}]<\\"é"}'


@pytest.mark.parametrize(
    ("written", "text", "calls"),
    [
        ("It rains.", "It rains.", []),
        ("\n It rains.\n", "\n It rains.\n", []),
        ("", "", []),
        ("\n\n", "\n\n", []),
        (IN_TAGS, "", [("f", ARGUMENTS)]),
        (f"\n\n{IN_TAGS}\n", "", [("f", ARGUMENTS)]),
        (f"I look.\n{IN_TAGS}\n{IN_TAGS}", "I look.\n", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
        (f"{IN_TAGS}\nThere.", "\nThere.", [("f", ARGUMENTS)]),
        (f"<tool_call>{CALL}</tool_call>", "", [("f", ARGUMENTS)]),
        (f"<tool_call>\n{CALL}", "", [("f", ARGUMENTS)]),  # nothing ended it
        (f"<tool_call>{CALL}\n<tool_call>{CALL}</tool_call>", "", [("f", ARGUMENTS), ("f", ARGUMENTS)]),
        (f"<tool_call>\n{CALL} There.", "There.", [("f", ARGUMENTS)]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 3}</tool_call>.', ".", [("f", "{}")]),
        ("<tool_call>f(1)</tool_call> so", "<tool_call>f(1)</tool_call> so", []),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        (
            '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
            '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
            [],
        ),
        ("<tool_call>" + "[" * 20_000, "<tool_call>" + "[" * 20_000, []),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
        ("a <tool_cal", "a <tool_cal", []),
        ("</tool_call>", "</tool_call>", []),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "7" * 5000 + "}}", "", [("f", '{"a": ' + "7" * 5000 + "}")]),
    ],
)
def test_calls_in_tags(written: str, text: str, calls: list[Any]) -> None:
    assert read(FORMATS["hermes"], [(100, written)]) == (text, calls, True)
    assert read(FORMATS["hermes"], [(100, char) for char in written])[:2] == (text, calls)


@pytest.mark.parametrize(
    ("written", "text", "calls"),
    [
        ("It rains.", "It rains.", []),
        (" \n{", " \n{", []),
        (PARAMETERS, "", [("f", '{"a": [{}]}')]),
        (f"\n{PARAMETERS}; {PARAMETERS}\n", "", [("f", '{"a": [{}]}')] * 2),
        (f"{PARAMETERS}\n{PARAMETERS}", "", [("f", '{"a": [{}]}')] * 2),
        (f"{PARAMETERS} There; so.", " There; so.", [("f", '{"a": [{}]}')]),
        (f"{PARAMETERS[:-1]} \n There.", " \n There.", [("f", '{"a": [{}]}')]),  # whatever cuts the blanks
        ('{"type": "function", "name": "g", "parameters": {}}', "", [("g", "{}")]),
        ('{"name":"g","arguments":{}}', "", [("g", "{}")]),
        (f"So: {PARAMETERS}", f"So: {PARAMETERS}", []),
        ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),  # no tool's name
        ('{"name": "f", "parameters": 3}', '{"name": "f", "parameters": 3}', []),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('{"answer": [1]}', '{"answer": [1]}', []),
        ('{"name": "' + "f" * 2000, '{"name": "' + "f" * 2000, []),
    ],
)
def test_calls_that_are_all_of_an_answer(written: str, text: str, calls: list[Any]) -> None:
    assert read(FORMATS["llama3_json"], [(100, written)]) == (text, calls, True)
    assert read(FORMATS["llama3_json"], [(9, ""), *((100, char) for char in written)]) == (text, calls, True)


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_is_cut_loses_nothing(name: str) -> None:
    """Its arguments so far are handed on, or its name; half of a name is text."""
    key = "parameters" if name == "llama3_json" else "arguments"
    begin: list[tuple[int, str]] = [] if name == "llama3_json" else [(7, "" if "tokens" in name else "<tool_call>")]
    tag = "<tool_call>" if name == "hermes" else ""

    def after(text: str) -> Read:
        return read(FORMATS[name], [*begin, (100, text)], has_ended=False)

    assert after(f'{{"name": "f", "{key}": {{"a": "P') == ("", [("f", '{"a": "P')], False)
    assert after('{"name": "f", "') == ("", [("f", "")], False)
    half = after('{"name": "')
    assert half[:2] == (f'{tag}{{"name": "', [])


def test_tags_that_are_tokens_are_no_text() -> None:
    pieces = [
        (100, "I <tool_call>. "),
        (7, ""),
        (100, f"\n{CALL}\n"),
        (8, ""),
        (100, "\n"),
        (7, ""),
        (100, CALL),
        (8, ""),
    ]
    calls = [("f", ARGUMENTS)] * 2
    assert read(FORMATS["hermes in tokens"], pieces) == ("I <tool_call>. ", calls, True)
    torn = [(7, ""), (100, '{"name": "f", "arguments": {"a": '), (8, ""), (100, " so")]
    assert read(FORMATS["hermes in tokens"], torn) == (" so", [("f", '{"a": ')], False)
    assert read(FORMATS["hermes in tokens"], [(7, ""), (100, "x"), (7, ""), (100, CALL), (8, "")])[1] == calls[:1]


WORDS = [
    *("<tool_call>", "</tool_call>", "<tool_", "\n", " ", ";", "}", "{", '"', "\\", ",", "Hm", "é"),
    *('{"name": "f", "arguments": ', '{"name": "g", "parameters": ', '{"a": "}"}', "{}}", CALL, PARAMETERS, "[[["),
]


@given(
    words=st.lists(st.sampled_from(WORDS), max_size=10),
    cuts=st.sets(st.integers(0, 200), max_size=12),
    name=st.sampled_from(["hermes", "llama3_json"]),
    has_ended=st.booleans(),
)
def test_where_tokens_cut_an_answer_changes_nothing(
    words: list[str], cuts: set[int], name: str, has_ended: bool
) -> None:
    """And nothing that a model may write raises."""
    written = "".join(words)
    at_once = read(FORMATS[name], [(100, written)], has_ended=has_ended)
    assert read(FORMATS[name], cut(written, cuts), has_ended=has_ended) == at_once
    if not at_once[1]:
        assert at_once[0] == written, "without a call all of it is text"


@given(words=st.lists(st.sampled_from(WORDS), max_size=10), cuts=st.sets(st.integers(0, 200), max_size=12))
def test_tokens_for_tags_are_found_at_any_place(words: list[str], cuts: set[int]) -> None:
    pieces: list[tuple[int, str]] = []
    for word in words:
        pieces += [(TAGS[word], "")] if word in TAGS else cut(word, cuts)
    whole = [(TAGS[word], "") if word in TAGS else (100, word) for word in words]
    assert read(FORMATS["hermes in tokens"], pieces) == read(FORMATS["hermes in tokens"], whole)


@given(
    st.dictionaries(st.text(max_size=3), st.recursive(st.text() | st.integers(), st.lists, max_leaves=5), max_size=3)
)
def test_any_arguments_are_handed_on_as_they_are(arguments: dict[str, Any]) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    for name, call in (
        ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'),
        ("llama3_json", f'{{"name": "f", "parameters": {written}}}'),
    ):
        assert read(FORMATS[name], [(100, char) for char in call]) == ("", [("f", written)], True)


def test_every_beginning_of_a_head_may_become_one() -> None:
    for head in (
        '{ "name" : "a\\"b" , "arguments" : {',
        '\n{"type": "function", "name": "f", "parameters": {',
    ):
        assert all(call_head(head[:end]) == "part" for end in range(len(head)))
        assert call_head(head) is not None
        assert call_head(head) != "part"
    assert call_head('{"type": "method"') is None


@pytest.mark.parametrize("tokens", [FORMATS["hermes"], ToolTokens()])
def test_blanks_without_end_are_not_read_over_with_every_token(tokens: ToolTokens) -> None:
    """A caller may bias a model to write nothing else, and the event loop reads them."""
    started = time.thread_time()
    assert read(tokens, [(100, "    ")] * 32_000)[:2] == ("    " * 32_000, [])
    assert time.thread_time() - started < 2


@pytest.mark.parametrize("begin", ["<tool_call>\nx", f"<tool_call>{CALL[:-1]}, "])
def test_what_a_tag_holds_is_looked_at_once(begin: str) -> None:
    """No call, or keys after one: all of it was searched for the end of the tag with every token."""
    started = time.thread_time()
    told = read(FORMATS["hermes"], [(100, begin), *[(100, "abcdefghij" * 8)] * 32_000])
    assert told[0].endswith("abcdefghij" * 8 * 32_000)
    assert time.thread_time() - started < 2
