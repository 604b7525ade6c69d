"""Answers held to an expression, a list of texts or rules: whatever a model ends is one of them, at bounded cost."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from xgrammar import GrammarMatcher

from cluster.errors import InvalidRequest
from cluster.messages import Answer, JsonSchema, TextGrammar, ToolCallGrammar, ToolTokens
from gateway.request.text_grammar import checked_choice, checked_regex, checked_rules
from router_service.grammar.compiler import GrammarCompiler
from router_service.grammar.structural_tags.format import structural_tag
from router_service.grammar.vocabulary import GrammarVocabulary, compile_tag, new_compiler
from tests.router_service.engines import Bench, follow
from tests.router_service.grammar.test_grammar_walks import INFO, PATTERNS, quietly, walk
from tests.router_service.requests import make_request
from tests.router_service.schemas import WEATHER

EOS = 1

# Pieces of expressions, as Python and GBNF write them.
_CHARS = [
    *(("a", '"a"'), ("é", '"é"'), ("😀", '"\\U0001F600"'), (r"\n", r'"\n"'), (r"\"", r'"\""'), (r"\\", r'"\\"')),
    *(("[a-c]", "[a-c]"), ("[^a-c]", "[^a-c]"), (r"[\]\-^]", r"[\]\-^]"), (r"[é-ü😀]", r"[\u00e9-\u00fc\U0001F600]")),
    *((r"[\s\S]", "."), ("(?:x y)", '"x y"'), ("", '""'), (r"[^\n\"]", r'[^\n"]')),
]
_TIMES = [
    ("*", "*"),
    ("+", "+"),
    ("?", "?"),
    ("{2}", "{2}"),
    ("{1,}", "{1,}"),
    ("{0,3}", "{0,3}"),
    ("{2,130}", "{2,130}"),  # past 128 xgrammar counts, up to there it writes repetitions out
]


def _times(one: Any, times: Any) -> Any:
    return (f"(?:{one[0]}){times[0]}", f"({one[1]}){times[1]}")


def _inner(inner: Any) -> Any:
    return (
        st.builds(_times, inner, st.sampled_from(_TIMES))
        | st.lists(inner, max_size=3).map(lambda parts: ("".join(p for p, _ in parts), " ".join(g for _, g in parts)))
        | st.lists(inner, min_size=1, max_size=3).map(
            lambda options: (f"(?:{'|'.join(p for p, _ in options)})", f"({' | '.join(g for _, g in options)})")
        )
    )


EXPRESSIONS = st.recursive(st.sampled_from(_CHARS), _inner, max_leaves=8)


def check(grammar: Answer, expression: str, seed: int) -> None:
    try:
        tag = structural_tag(grammar)
    except ValueError:  # refused: counts within one another multiply
        return
    written = walk(tag, seed)
    if written is not None:
        assert re.fullmatch(expression, written.decode()), (expression, written)


def check_both(pair: tuple[str, str], seed: int) -> None:
    """The same texts, written as an expression and as rules. The middle of the rules is a rule of its own."""
    expression, rules = pair
    check(checked_regex(expression or "(?:)", "regex"), expression, seed)
    check(checked_rules(f"root ::= one\none ::= {rules}\n", "grammar"), expression, seed)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(?:(?:é){2,130})*", "é"),
        ("(?:(?:ab){129,200};)?", "ab"),
        ("a(?:é{130,}|)", "aé"),
        ("(?:b|c{2,130})+", "bc"),
        ("(?:(?:b{2,3})?)+", "b"),
        ("b|a|b{1,2}", "abb"),
        ("b|a|ba*", "aa"),
        ("a|(?:aa|c)b?", "abb"),
        (r'(?:x|"{1,2}|")y', 'x""y'),
    ],
)
def test_what_is_counted_beside_something_else_is_no_more_and_no_less(expression: str, text: str) -> None:
    """xgrammar mixes the states of an expression up: it took all of these texts for matches."""
    assert not re.fullmatch(expression, text)
    assert not matches(checked_regex(expression, "regex"), text)
    quoted = json.dumps({"type": "string", "pattern": expression})
    assert not matches(JsonSchema(quoted, "schema"), json.dumps(text, ensure_ascii=False))


def test_counts_of_an_expression_within_another_are_kept_on_both_sides() -> None:
    for low, high in ((2, 130), (129, 131), (128, 128), (130, 130), (0, 129)):
        expression = f"(?:(?:é){{{low},{high}}};)*"
        for number in {low - 1, low, high, high + 1} - {-1}:
            text = ";" if number == 0 else f"é;{'é' * number};"
            assert matches(checked_regex(f"(?:é;)?{expression}", "regex"), text) == (low <= number <= high), text


def matches(grammar: Answer, text: str) -> bool:
    matcher = GrammarMatcher(compile_tag(new_compiler(INFO), structural_tag(grammar)))
    return matcher.accept_string(text) and matcher.is_completed()


@quietly
@given(EXPRESSIONS, st.integers(0, 2**32))
def test_a_walk_that_ends_matches(pair: tuple[str, str], seed: int) -> None:
    check_both(pair, seed)


@pytest.mark.long
@settings(quietly, max_examples=1000)
@given(EXPRESSIONS, st.integers(0, 2**32))
def test_many_walks_that_end_match(pair: tuple[str, str], seed: int) -> None:
    check_both(pair, seed)


@pytest.mark.parametrize("pattern", [*PATTERNS, "(ab){0,200}", "[^a]{200}", "a|", r"[\x00-\x1f]{1,3}", r"\d{4}-\d\d"])
def test_a_walk_through_an_expression_matches_all_of_it(pattern: str) -> None:
    for seed in range(5):
        check(checked_regex(pattern, "regex"), pattern.replace(r"\u00e9", "é"), seed)


@quietly
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=5), st.integers(0))
def test_a_walk_ends_in_one_of_the_choices(choices: list[str], seed: int) -> None:
    written = walk(structural_tag(checked_choice(choices, "guided_choice")), seed)
    assert written is not None
    assert written.decode() in choices


SUMS = "root ::= sum\nsum ::= term (\"+\" term)*\nterm ::= [0-9] | '(' sum ')'".replace("'", '"')


def test_a_walk_through_rules_that_hold_each_other_is_read_as_they_say() -> None:
    ended = [written for seed in range(30) if (written := walk(structural_tag(checked_rules(SUMS, "ebnf")), seed))]
    assert len(ended) > 10
    for written in ended:
        text = written.decode()
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text), int)  # it is a sum to Python as well


def test_json_without_whitespace_has_none() -> None:
    """vLLM's `disable_any_whitespace`."""
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "array", "items": {"const": 1}}}})
    for seed in range(20):
        written = walk(structural_tag(JsonSchema(schema, "json", any_whitespace=False)), seed)
        assert written is None or not re.search(rb"\s", written)
    whole = [walk(structural_tag(JsonSchema(schema, "json")), seed) for seed in range(20)]
    assert any(written and re.search(rb"\s", written) for written in whole)


@pytest.fixture(scope="module")
def bench(directory: Path) -> Bench:
    """An engine of random weights."""
    return Bench(directory)


@pytest.fixture(scope="module")
def tokenizer(bench: Bench) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(bench.vocabulary.directory)


PHONE = r"\+33 [1-9]( \d\d){4}"
ANSWERS: dict[str, tuple[Answer, str]] = {
    "regex": (checked_regex(PHONE, "regex"), PHONE),
    "choice": (checked_choice(["Comté", "Brie de Meaux", " oui"], "guided_choice"), "Comté|Brie de Meaux| oui"),
    "rules": (
        checked_rules('root ::= "Mr " name ("." | "!")\nname ::= [A-Z] [a-z]{1,8}', "ebnf"),
        "Mr [A-Z][a-z]{1,8}[.!]",
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_engine_s_answer_is_one_of_the_texts(bench: Bench, tokenizer: Any, name: str, temperature: float) -> None:
    grammar, expression = ANSWERS[name]
    for seed in range(3):
        prompt = random.Random(seed).choices(range(3, 300), k=12)
        request = make_request(prompt, grammar=grammar, temperature=temperature, seed=seed, max_tokens=100)
        [output] = bench.run(request)
        assert output[-1] == EOS
        assert re.fullmatch(expression, tokenizer.decode(output[:-1]))


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("Comté", True),
        ("Comt", False),
        ("Comté!", False),
        ("", False),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {}}]', True),
    ],
)
def test_beside_tools_that_may_be_called_a_text_is_held_to_its_grammar(
    bench: Bench, tokenizer: Any, text: str, fits: bool
) -> None:
    tools = (("f", JsonSchema('{"type": "object"}', "tools[0]")),)
    grammar = ToolCallGrammar(tools, required=False, answer=ANSWERS["choice"][0], tokens=ToolTokens())
    state = bench.grammar_state(make_request([5], grammar=grammar))
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    assert (state.error is None) == fits


# ── Hostile ones ──


def rules(text: str, *more: str) -> TextGrammar:
    return checked_rules("\n".join((text, *more)), "ebnf")


LONG_S = 120.0
HOSTILE = {
    "an expression that explodes": checked_regex("(((a*){1,100}){1,100}){1,100}", "regex"),
    "a huge expression": checked_regex("((a|b?){1,99}c?){1,99}" * 20, "regex"),
    "repetitions in each other": rules('root ::= ((((("a"{1,100}){1,100}){1,100}){1,100}){1,100}){1,100}'),
    "nothing or twice as much, thirty times": rules(
        "root ::= x0", *(f"x{i} ::= x{i + 1} x{i + 1}" for i in range(30)), 'x30 ::= "a" | ""'
    ),
    "a chain of three thousand rules": rules(
        "root ::= x0", *(f'x{i} ::= x{i + 1} | "z"' for i in range(1900)), 'x1900 ::= "a"'
    ),
}


@pytest.fixture(scope="module")
def compiler(bench: Bench) -> Any:
    vocabulary: GrammarVocabulary = bench.vocabulary
    timeout_s = 0.1  # on the fastest machine, too, what is hostile takes several times that
    compiler = GrammarCompiler(vocabulary, timeout_s=timeout_s, token_timeout_s=1.0, cache_bytes=2**24)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_in_bounded_time_and_others_go_on(compiler: GrammarCompiler, name: str) -> None:
    async def state(grammar: Answer) -> Any:
        async with asyncio.timeout(600):  # of a busy machine
            return await compiler.state(make_request([5], grammar=grammar))

    async def scenario() -> None:
        hostile = asyncio.create_task(state(HOSTILE[name]))
        for i in range(3):  # a plain one needs no trial, so it does not queue behind
            await state(checked_choice([f"{name} {i}", "x"], "guided_choice"))
        with pytest.raises(InvalidRequest) as raised:
            await hostile
        assert raised.value.param == HOSTILE[name].param
        assert raised.value.message.startswith(f"{HOSTILE[name].param}: ")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "text",
    ['root ::= root root | "a"', 'root ::= "a" root "a" | "a"', 'root ::= ("a"*)*', 'root ::= x* "b"\nx ::= "a"*'],
)
def test_readings_that_grow_with_the_text_end_their_own_answer(bench: Bench, tokenizer: Any, text: str) -> None:
    """Compiling these costs nothing and a token little; the memory of all ways to read it grows by the square."""
    [a] = tokenizer.encode("a", add_special_tokens=False)
    state = bench.grammar_state(make_request([5], grammar=checked_rules(text, "ebnf")))
    started = time.thread_time()
    for _ in range(10_000):
        state.accept(a)
        if not state.is_ready(timeout_s=LONG_S):
            break
    assert isinstance(state.error, InvalidRequest)
    assert re.search("too ambiguous to be followed|too long to follow", state.error.message)
    assert time.thread_time() - started < LONG_S


def test_left_recursion_is_followed_like_any_other(bench: Bench, tokenizer: Any) -> None:
    plain = checked_rules('root ::= root "," item | item\nitem ::= [0-9]+', "ebnf")
    state = bench.grammar_state(make_request([5], grammar=plain))
    follow(state, [*tokenizer.encode("12,5," * 400 + "7", add_special_tokens=False), EOS])
    assert state.error is None


def test_a_long_ordinary_answer_is_followed_to_its_end(bench: Bench, tokenizer: Any) -> None:
    """What a token costs is bounded over all of the output; nothing ordinary comes near."""
    schema = JsonSchema(json.dumps({"type": "array", "items": WEATHER}), "json")
    one = '{"ville": "Paris", "days": 12, "units": "metric", "hourly": true}'
    state = bench.grammar_state(make_request([5], grammar=schema))
    follow(state, [*tokenizer.encode(f"[{', '.join([one] * 100)}]", add_special_tokens=False), EOS])
    assert state.error is None
    state = bench.grammar_state(make_request([5], grammar=checked_rules(SUMS, "ebnf")))
    follow(state, [*tokenizer.encode("(1+2)+" * 800 + "3", add_special_tokens=False), EOS])
    assert state.error is None
