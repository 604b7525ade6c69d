"""Which schemas the doors take, and which they refuse with what field."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from cluster.errors import InvalidRequest
from gateway.request.protocol import AnswerFields
from gateway.request.structured_output import read_answer
from gateway.request.structured_schema import (
    _OF_A_TYPE,
    _REFUSED,
    _WHOLE,
    MAX_DEPTH,
    MAX_ENUM_VALUES,
    MAX_SCHEMAS,
    checked_schema,
)

PARAM = "response_format.json_schema.schema"


class Street(BaseModel):
    name: str = Field(min_length=1, max_length=40, description="without the number")
    number: int | None = Field(None, ge=1)


class Person(BaseModel):
    name: str
    code: str = Field(pattern=r"^[A-Z]{2}\d+$")
    home: Street
    others: list[Street] = Field(default_factory=list, max_length=3)
    kind: str = Field("human", json_schema_extra={"enum": ["human", "manta"]})
    extra: dict[str, float] = {}
    parent: Person | None = None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "additionalProperties": True},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"const": 1.0, "type": "integer"},
        {"type": "string", "format": "date-time", "title": "not a word", "x-mine": {"not": 1}},
        {"properties": {"not": {"type": "string"}, "if": {}}},
        {"oneOf": [{"type": "string"}, {"type": "null"}], "discriminator": {"propertyName": "x"}},
        {"$ref": "#/$defs/a", "description": "a", "$defs": {"a": {"type": "string"}}},
        {"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": {"type": "string"}}},
        Person.model_json_schema(),
        nested(MAX_DEPTH - 1),
        {"type": "string", "pattern": r'^[^"\\\n]+$', "maxLength": 200},
        {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
        {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        {"type": "number", "multipleOf": 0.01, "minimum": 0},
        {"enum": [2**70, -(2**64)]},
        {"patternProperties": {"^x-": {}}, "properties": {"ab": {}}, "required": ["ab"]},
    ],
)
def test_what_is_taken_is_sent_as_it_came(schema: dict[str, Any]) -> None:
    assert json.loads(checked_schema(schema, PARAM).text) == schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "expected a JSON Schema"),
        ([], "expected a JSON Schema"),
        ({"type": "banana"}, "#/type: expected one of"),
        ({"type": "string", "not": {}}, "#/not: not supported"),
        ({"properties": {"a": {"if": {}}}}, "#/properties/a/if: not supported"),
        ({"$ref": "https://example.com/schema"}, "only references within the schema"),
        ({"$ref": "other.json#/a"}, "only references within the schema"),
        ({"$ref": 3}, "#/$ref: expected a string"),
        ({"$ref": "#/$defs/a"}, "#/$ref: it refers to nothing"),
        ({"$ref": "#/default", "default": {"pattern": "a"}}, "#/$ref: it refers to what is no schema"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "more than one entry"),
        ({"anyOf": [{"required": ["a"]}], "properties": {"a": {}}}, "'anyOf' and 'properties' in one schema"),
        ({"anyOf": []}, "#/anyOf: expected a list of schemas"),
        ({"type": "string", "enum": [1]}, "not of its 'type'"),
        ({"enum": "ab"}, "#/enum: expected a list"),
        ({"enum": list(range(MAX_ENUM_VALUES + 1))}, "#/enum: at most"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems: not supported"),
        ({"type": "array", "contains": {}}, "#/contains: not supported"),
        ({"type": "array", "items": [{}]}, "#/items: expected an object or a boolean"),
        ({"type": "string", "minLength": -1}, "#/minLength: expected a number"),
        ({"type": "string", "minLength": 2**40}, "#/minLength: expected a number"),
        ({"type": "string", "pattern": "a" * 513}, "at most 512 characters"),
        ({"type": "string", "pattern": "^(a|bc)+$", "maxLength": 3}, "#/pattern: a length and a 'pattern'"),
        ({"type": "string", "pattern": "^a{5}$", "maxLength": 3}, "#/pattern: no text of these lengths"),
        ({"type": "string", "pattern": "a^b"}, "#/pattern: '^' is supported at the ends"),
        ({"type": "string", "pattern": "(a$|b)"}, "#/pattern: '$' is supported at the ends"),
        ({"type": "string", "pattern": "^(?=a)b"}, "#/pattern: only plain groups"),
        ({"type": "string", "pattern": r"a\b"}, r"'\b' is not supported"),
        ({"type": "string", "pattern": r"(a)\1"}, r"'\1' is not supported"),
        ({"type": "string", "pattern": "(" * 200 + ")" * 200}, "groups deeper than"),
        ({"type": "string", "pattern": "["}, "it ends too early"),
        ({"type": "string", "pattern": "a{1,9999999}"}, "at most 100000 repetitions"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "#/minLength: more than 'maxLength'"),
        ({"items": {"minimum": "3"}}, "#/items/minimum: expected a number"),
        ({"exclusiveMinimum": True}, "#/exclusiveMinimum: expected a number"),
        ({"multipleOf": 0}, "#/multipleOf: expected a number over 0"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no number satisfies it"),
        ({"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}, "no number satisfies it"),
        ({"type": "integer", "multipleOf": 7, "minimum": 8, "maximum": 13}, "no number satisfies it"),
        ({"type": "number", "multipleOf": 1000003}, "'multipleOf' is too large"),
        ({"properties": {"a": {"minimum": 10**60}}}, "#/properties/a: a bound has too many digits"),
        ({"propertyNames": {"maxLength": 2}, "properties": {"abc": {}}}, "#/propertyNames: not supported where"),
        ({"patternProperties": {"^a": {}, "^ab": {}}}, "#/patternProperties: more than one"),
        ({"patternProperties": {"^a": {}}, "properties": {"ab": {}}}, "#/patternProperties: more than one"),
        ({"patternProperties": {"^a": {}}, "required": ["ab"]}, "#/required: every name must be in 'properties'"),
        ({"minProperties": 2}, "#/minProperties: more than one property without"),
        ({"required": ["a"], "additionalProperties": False}, "#/required: a name is not in 'properties'"),
        ({"type": []}, "#/type: expected one type at least"),
        ({"items": {"$id": "https://example.com/a"}}, "#/items/$id: not supported"),
        ({"anyOf": [{}], "unevaluatedProperties": False}, "'anyOf' and 'unevaluatedProperties' in one schema"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        ({"properties": []}, "#/properties: expected an object"),
        ({"required": "a"}, "#/required: expected a list of names"),
        ({"minimum": float("inf")}, "its numbers must be finite"),
        ({"description": "x" * 70_000}, "at most 65536 bytes"),
        (nested(MAX_DEPTH + 1), "nested deeper than"),
        ({"anyOf": [{}] * (MAX_SCHEMAS + 1)}, f"at most {MAX_SCHEMAS} schemas"),
    ],
)
def test_what_could_not_be_enforced_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        checked_schema(schema, PARAM)
    assert raised.value.param == PARAM
    assert message in raised.value.message


def test_json_object_with_a_schema_is_held_to_it() -> None:
    """As llama.cpp's clients send it; the schema was overlooked."""
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    found = read_answer(AnswerFields(response_format={"type": "json_object", "schema": schema}))
    assert found is not None
    assert (json.loads(found.text), found.param) == (schema, "response_format.schema")
    with pytest.raises(InvalidRequest, match=r"response_format\.schema at #/not: not supported"):
        read_answer(AnswerFields(response_format={"type": "json_object", "schema": {"not": {}}}))


WORDS = sorted(
    {*_OF_A_TYPE, *_REFUSED, *_WHOLE, "type", "format", "default", "examples", "title", "$defs", "uniqueItems"}
)


@pytest.mark.parametrize("word", WORDS)
def test_a_property_may_be_called_like_a_word_of_schemas(word: str) -> None:
    """The classic weather tool has a parameter `format`, and its requests were answered with 500."""
    schema = {"type": "object", "properties": {word: {"enum": [{word: [word]}]}}, "required": [word]}
    assert json.loads(checked_schema(schema, PARAM).text) == schema


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "enum", "const", "properties", "items", "anyOf", "$ref", "pattern", "minLength"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_a_schema_or_refused(document: Any) -> None:
    with contextlib.suppress(InvalidRequest):
        definition = {"name": "x", "schema": document}
        read_answer(AnswerFields(response_format={"type": "json_schema", "json_schema": definition}))
