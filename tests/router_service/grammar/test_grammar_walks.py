"""Random walks through compiled grammars: whatever a model writes and ends is JSON and validates."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from xgrammar import GrammarMatcher, TokenizerInfo, VocabType, allocate_token_bitmask

from cluster.errors import InvalidRequest
from gateway.request.structured_schema import checked_schema
from router_service.grammar.structural_tags.format import structural_tag
from router_service.grammar.vocabulary import compile_tag, new_compiler

# Every byte, and tokens that go past the end of a string, a number or an escape, as those of real vocabularies do.
TOKENS = [bytes([i]) for i in range(256)]
TOKENS += [
    token.encode() for token in ('", "', '":', '"}', '"]', '\\"', "\\n", "\\u00", 'a"', "é", "日本", "12", "0.5", "e1")
]
TOKENS += [
    token.encode() for token in ("}}", "]}", "],", ' {"', "true,", "aaaa", "ab", "x-", "  ", "\n", '\\u00e9"', "😀")
]
EOS = len(TOKENS)
INFO = TokenizerInfo([*TOKENS, b"</s>"], VocabType.RAW, stop_token_ids=[EOS])
CLOSING = {i for i, token in enumerate(TOKENS) if token in (b'"', b"}", b"]", b'"}', b'"]', b"}}", b"]}")} | {EOS}
MAX_TOKENS = 400
MAX_WALK_S = 0.5  # CPU time; what can be read in very many ways costs seconds a token, and is refused by the engine


def walk(tag: str, seed: int) -> bytes | None:
    """What a model at random writes; None if it comes to no end, or takes too long."""
    compiled = compile_tag(new_compiler(INFO), tag)
    matcher, bitmask, draw = GrammarMatcher(compiled), allocate_token_bitmask(1, EOS + 1), random.Random(seed)
    written, started = b"", time.thread_time()
    for _ in range(MAX_TOKENS):
        if time.thread_time() - started > MAX_WALK_S:
            break
        matcher.fill_next_token_bitmask(bitmask)
        words = bitmask[0].tolist()
        allowed = [i for i in range(EOS + 1) if words[i // 32] >> (i % 32) & 1]
        assert allowed, f"a dead end after {written!r}"
        closing = [i for i in allowed if i in CLOSING]
        token_id = draw.choice(closing if closing and draw.random() < 0.3 else allowed)
        assert matcher.accept_token(token_id)
        if token_id == EOS:
            return written
        written += TOKENS[token_id]
    return None


NAMES = ["a", "ab", "b", "items", "$ref", "type", "a/b~c%", "é", 'q"', "", "x-y"]
PATTERNS = [
    *(
        "^[a-c]+$",
        "b",
        "^a|b$",
        "^(a|bc){1,2}$",
        '^[^"a]{0,3}$',
        r"^\d{2,}$",
        r"^\w+\s?$",
        r"^[\W_]$",
        ".",
        "^$",
        r"^\n$",
    ),
    *(r'^\\"$', "^.{0,129}$", r"^\S\D$", "^[é-ü😀]+$", r"^(?:x-|y_)\w{1,3}$", r"^[\]\-^]$", r"^\u00e9\/$", "^a{3}?$"),
]
BOUNDS = st.integers(-30, 30) | st.sampled_from(
    [0.5, -2.25, 0.1, 1e-7, 1.0, 12345.678, 2**53, 2**63, -(2**70), 1e15, 0]
)
CONSTANTS = st.sampled_from(
    [None, True, 1, 1.0, -0.5, 2**70, 1e22, "", "a", 'b"\\\n', "日", [], [1, "a"], {}, {"type": ["a"]}]
)


def words(**optional: Any) -> Any:
    return st.fixed_dictionaries({}, optional=optional)


def of_type(name: str | list[str], strategy: Any) -> Any:
    return st.builds(lambda schema, typed: {"type": name, **schema} if typed else schema, strategy, st.booleans())


STRINGS = (
    of_type("string", words(minLength=st.integers(0, 4), maxLength=st.sampled_from([0, 1, 4, 5, 33, 129, 200])))
    | of_type("string", st.builds(lambda pattern: {"pattern": pattern}, st.sampled_from(PATTERNS)))
    | of_type(
        "string", words(pattern=st.sampled_from(PATTERNS), minLength=st.integers(0, 2), maxLength=st.integers(1, 9))
    )
    | words(type=st.just("string"), format=st.sampled_from(["date-time", "email", "ipv6", "uuid", "uri", "regex"]))
)
STEPS = st.sampled_from([1, 2, 3, 7, 10, 25, 0.5, 0.25])
NUMBERS = st.builds(
    lambda name, schema: {"type": name, **schema},
    st.sampled_from(["integer", "number", ["number", "null"]]),
    words(minimum=BOUNDS, maximum=BOUNDS, exclusiveMinimum=BOUNDS, exclusiveMaximum=BOUNDS)
    | words(minimum=BOUNDS, multipleOf=STEPS)
    | words(maximum=BOUNDS, exclusiveMinimum=BOUNDS, multipleOf=STEPS),
)
VALUES = (
    st.builds(lambda value: {"const": value}, CONSTANTS)
    | st.builds(lambda values: {"enum": values}, st.lists(CONSTANTS, min_size=1, max_size=3))
    | st.sampled_from([{}, True, {"type": "boolean"}, {"type": ["integer", "null"]}, {"default": {"$ref": "x"}}])
    | st.sampled_from([{"$ref": "#/$defs/a~1b%25"}, {"$ref": "#/$defs/tree"}, {"allOf": [{"$ref": "#/%24defs/tree"}]}])
)
COUNTS = st.integers(0, 3)


def holders(inner: Any) -> Any:
    """Schemas that hold others."""
    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    return (
        of_type(
            "array",
            words(
                items=inner | st.just(False),
                prefixItems=st.lists(inner, min_size=1, max_size=3),
                minItems=COUNTS,
                maxItems=COUNTS | st.just(150),
            ),
        )
        | of_type("array", words(prefixItems=st.lists(inner, min_size=1, max_size=2), unevaluatedItems=st.booleans()))
        | of_type("object", words(properties=named, unevaluatedProperties=st.booleans(), maxProperties=COUNTS))
        | of_type(
            "object",
            words(
                properties=named,
                required=st.lists(st.sampled_from(NAMES), max_size=2),
                additionalProperties=inner | st.booleans(),
                minProperties=COUNTS,
                maxProperties=COUNTS,
            ),
        )
        | of_type(
            "object",
            words(
                propertyNames=STRINGS | st.just({"enum": ["a", 1, "items"]}),
                additionalProperties=inner,
                maxProperties=COUNTS,
                minProperties=st.integers(0, 1),
            ),
        )
        | of_type(
            "object",
            words(
                patternProperties=st.dictionaries(st.sampled_from(["^x-", "^y[0-9]$", "b", ".*"]), inner, max_size=2),
                properties=st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
                additionalProperties=st.booleans(),
            ),
        )
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
    )


SCHEMAS = st.recursive(STRINGS | NUMBERS | VALUES, holders, max_leaves=5).map(
    lambda schema: {
        **(schema if isinstance(schema, dict) else {}),
        "$defs": {
            "a/b%": {"type": "string", "maxLength": 3},
            "tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
        },
    }
)


def check(schema: Any, seed: int) -> None:
    try:
        tag = structural_tag(checked_schema(schema, "schema"))
    except (InvalidRequest, ValueError):  # refused by the door, or the coordinator
        return
    written = walk(tag, seed)
    if written is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(written))


quietly = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@quietly
@example({"type": "object", "properties": {"a": {"const": 1}}, "minProperties": 2}, 0)
@given(SCHEMAS, st.integers(0, 2**32))
def test_a_walk_that_ends_validates(schema: Any, seed: int) -> None:
    check(schema, seed)


@pytest.mark.parametrize(("word", "others"), [({}, False), ({"additionalProperties": {"type": "null"}}, True)])
def test_beside_declared_properties_others_come_only_where_the_schema_speaks_of_them(word: Any, others: bool) -> None:
    """A small model wrote one property after the other, until it was cut."""
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, **word}
    tag = structural_tag(checked_schema(schema, "response_format"))
    matcher = GrammarMatcher(compile_tag(new_compiler(INFO), tag))
    assert matcher.accept_string('{"a": null')
    assert matcher.accept_string(', "b": null}') == others


@pytest.mark.parametrize(
    ("words", "others"),
    [({"properties": {}}, False), ({"properties": {}, "additionalProperties": True}, True), ({}, True)],
)
def test_an_object_of_no_properties_is_empty(words: Any, others: bool) -> None:
    """A function of no parameters has such a schema, and was called with what the model made up."""
    tag = structural_tag(checked_schema({"type": "object", **words}, "tools[0].function.parameters"))
    assert GrammarMatcher(compile_tag(new_compiler(INFO), tag)).accept_string("{}")
    assert GrammarMatcher(compile_tag(new_compiler(INFO), tag)).accept_string('{"b": null}') == others


@pytest.mark.long
@settings(quietly, max_examples=10_000)
@given(SCHEMAS, st.integers(0, 2**32))
def test_many_walks_that_end_validate(schema: Any, seed: int) -> None:
    check(schema, seed)
