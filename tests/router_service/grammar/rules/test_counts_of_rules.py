"""Rules with counts past 128 and counts within counts: what is accepted is what they say, by a matcher of our own."""

from __future__ import annotations

import functools
import json
import operator
import random
import time
from dataclasses import dataclass

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar import CompiledGrammar, GrammarMatcher

from gateway.request.structured_schema import checked_schema
from gateway.request.text_grammar import checked_rules
from router_service.grammar.structural_tags.format import structural_tag
from router_service.grammar.vocabulary import compile_tag, new_compiler
from tests.router_service.grammar.test_grammar_walks import INFO, quietly

COUNTS = [(0, 1), (0, None), (1, None), (2, 2), (2, 3), (0, 3), (3, None), (127, 129), (128, 128), (129, 131), (2, 130)]
COUNTS += [(130, None), (0, 200), (200, 200)]
MAX_CHARS = 400  # of a text


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class OneOf:
    chars: str


@dataclass(frozen=True)
class Rule:
    name: str


@dataclass(frozen=True)
class All:
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Any:
    options: tuple[Part, ...]


@dataclass(frozen=True)
class Times:
    body: Part
    low: int
    high: int | None


Part = Text | OneOf | Rule | All | Any | Times
Rules = dict[str, Part]
Json = dict[str, object]


def spelled(part: Part) -> str:
    """In GBNF."""
    match part:
        case Text(text):
            return f'"{text}"'
        case OneOf(chars):
            return f"[{chars}]"
        case Rule(name):
            return name
        case All(parts):
            return f"({' '.join(map(spelled, parts))})"
        case Any(options):
            return f"({' | '.join(map(spelled, options))})"
        case Times(body, low, high):
            return f"({spelled(body)}){{{low},{'' if high is None else high}}}"


class Reader:
    """Where parts may end in one text: places are the bits of a number, so all of them move on at once."""

    def __init__(self, rules: Rules, text: str) -> None:
        self._rules = rules
        self._text = text
        self._places: dict[str, int] = {}

    def matches(self) -> bool:
        return bool(self._ends(self._rules["root"], 1) >> len(self._text) & 1)

    def _ends(self, part: Part, places: int) -> int:
        match part:
            case Text(text):
                return (places & self._where(text)) << len(text)
            case OneOf(chars):
                return functools.reduce(operator.or_, ((places & self._where(char)) << 1 for char in chars))
            case Rule(name):
                return self._ends(self._rules[name], places)
            case All(parts):
                for one in parts:
                    places = self._ends(one, places)
                return places
            case Any(options):
                return functools.reduce(operator.or_, (self._ends(one, places) for one in options))
            case Times(body, low, high):
                found, count, seen = 0, 0, set()
                while places and (high is None or count <= high) and not (count >= low and places in seen):
                    if count >= low:
                        found |= places
                        seen.add(places)
                    places = self._ends(body, places)
                    count += 1
                return found

    def _where(self, text: str) -> int:
        if text not in self._places:
            found = (at for at in range(len(self._text) + 1) if self._text.startswith(text, at))
            self._places[text] = sum(1 << at for at in found)
        return self._places[text]


def written(rules: Rules, part: Part, draw: random.Random, depth: int = 0) -> str:
    """A text of it, or now and then one that has one too few or too many of something."""
    match part:
        case Text(text):
            return text
        case OneOf(chars):
            return draw.choice(chars)
        case Rule(name):
            return written(rules, rules[name], draw, depth)
        case All(parts):
            return "".join(written(rules, one, draw, depth) for one in parts)
        case Any(options):
            return written(rules, draw.choice(options), draw, depth)
        case Times(body, low, high):
            most = low + 2 if high is None else high
            if depth > 1:  # keeps texts short
                most = min(most, low + 1)
            numbers = [low, most, draw.randint(low, most)] + [low - 1, most + 1] * (draw.random() < 0.3)
            number = draw.choice(numbers)
            one = written(rules, body, draw, depth + 1)
            same = draw.random() < 0.5
            text = ""
            for _ in range(max(0, number)):
                text += one if same else written(rules, body, draw, depth + 1)
                if len(text) > MAX_CHARS:
                    break
            return text


def held(inner: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    several = st.lists(inner, min_size=1, max_size=3).map(tuple)
    counted = st.builds(lambda body, counts: Times(body, *counts), inner, st.sampled_from(COUNTS))
    return counted | several.map(All) | several.map(Any)


LEAVES = st.sampled_from([*map(Text, ("a", "b", "ab", "é", ";", "")), OneOf("ab"), OneOf("bc")])
PLAIN = st.recursive(LEAVES, held, max_leaves=3)
ROOTS = st.recursive(LEAVES | st.sampled_from([Rule("one"), Rule("two")]), held, max_leaves=6)
GRAMMARS = st.builds(lambda root, one, two: {"root": root, "one": one, "two": two}, ROOTS, PLAIN, PLAIN)


MAX_READ_S = 0.2  # CPU time; a text that can be read in very many ways is refused by the engine, too


def accepts(compiled: CompiledGrammar, text: str, max_s: float = 20.0) -> bool | None:
    """None where that would take too long."""
    matcher, started = GrammarMatcher(compiled), time.thread_time()
    for char in text:
        if not matcher.accept_string(char):
            return False
        if time.thread_time() - started > max_s:
            return None
    return bool(matcher.is_completed())


def check(rules: Rules, seed: int) -> None:
    text = "\n".join(f"{name} ::= {spelled(part)}" for name, part in rules.items())
    compiled = compile_tag(new_compiler(INFO), structural_tag(checked_rules(text, "grammar")))
    draw = random.Random(seed)
    for _ in range(6):
        sample = written(rules, rules["root"], draw)
        accepted = accepts(compiled, sample, MAX_READ_S)
        if accepted is None:
            return
        assert accepted == Reader(rules, sample).matches(), (text, sample)


@settings(quietly, max_examples=15)
@given(GRAMMARS, st.integers(0, 2**32))
def test_what_is_accepted_is_what_the_rules_say(rules: Rules, seed: int) -> None:
    check(rules, seed)


@pytest.mark.long
@settings(quietly, max_examples=1000)
@given(GRAMMARS, st.integers(0, 2**32))
def test_what_is_accepted_is_what_a_thousand_rules_say(rules: Rules, seed: int) -> None:
    check(rules, seed)


@pytest.mark.parametrize("times", ["{129}", "{2,130}", "{129,}", "{0,200}"])
@pytest.mark.parametrize("body", ['"ab"', '("é" | "x;")', "[a-c]", 'word ","', 'pair{2} "."'])
def test_a_count_past_128_is_no_more_and_no_less(body: str, times: str) -> None:
    low, comma, high = times[1:-1].partition(",")
    low, high = int(low), int(high) if high else None if comma else int(low)
    unit = {'"ab"': "ab", '("é" | "x;")': "é", "[a-c]": "b", 'word ","': "ab,", 'pair{2} "."': "(a)(a)."}[body]
    rules = f'root ::= (({body}){times} "!"){{1,2}}\nword ::= [a-z]{{2,130}}\npair ::= "(" [a-z] ")"'
    compiled = compile_tag(new_compiler(INFO), structural_tag(checked_rules(rules, "grammar")))
    for number in {low - 1, low, low + 1, high or 300, (high or 300) + 1} - {-1}:
        is_right = low <= number and (high is None or number <= high)
        for text in (f"{unit * number}!", f"{unit * low}!{unit * number}!"):
            assert accepts(compiled, text) == is_right, (number, text[:20])


@pytest.mark.parametrize(
    ("inner", "outer"), [((2, 130), (1, 3)), ((129, 131), (0, 2)), ((0, 2), (129, 130)), ((130, None), (1, 2))]
)
def test_lists_of_lists_are_as_long_as_their_schema_says(inner: tuple[int, int | None], outer: tuple[int, int]) -> None:
    def counted(counts: tuple[int, int | None], items: Json) -> Json:
        low, high = counts
        return {"type": "array", "items": items, "minItems": low} | ({} if high is None else {"maxItems": high})

    schema = counted(outer, counted(inner, {"type": "boolean"}))
    validator = jsonschema.Draft202012Validator(schema)
    compiled = compile_tag(new_compiler(INFO), structural_tag(checked_schema(schema, "schema")))
    low, high = inner[0], inner[1] or inner[0] + 2
    for length in {low - 1, low, high, high + 1} - {-1}:
        for number in {outer[0] - 1, outer[0], outer[1], outer[1] + 1} - {-1}:
            lists = [[True] * length] * number
            assert accepts(compiled, json.dumps(lists)) == validator.is_valid(lists), (length, number)
