"""Schemas whose every instance is short enough for a test, and one that is never short."""

from __future__ import annotations

import json
from typing import Any

from cluster.messages import JsonSchema

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ville": {"enum": ["Paris", "Köln", "東京", 'a "quoted" one']},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"anyOf": [{"const": "metric"}, {"type": "null"}]},
        "hourly": {"type": "boolean"},
    },
    "required": ["ville", "days"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "leaf": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "node": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1, "maxItems": 2},
    },
    "type": "array",
    "items": {"$ref": "#/$defs/node"},
    "minItems": 1,
    "maxItems": 2,
}
LIKE_WORDS = ("format", "items", "required", "$ref")  # properties and values that are called like words of schemas
BOUNDED: dict[str, dict[str, Any]] = {
    "weather": WEATHER,
    "like-words": {
        "type": "object",
        "properties": {name: {"enum": [1, {name: [name]}]} for name in LIKE_WORDS},
        "required": list(LIKE_WORDS),
        "additionalProperties": False,
    },
    "tree": TREE,
    "text": {"type": "string", "minLength": 2, "maxLength": 5},
    "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}-[A-Z]{2}$"},
    "number": {"type": "number", "minimum": -1.5, "maximum": 3.25},
    "tuple": {"type": "array", "prefixItems": [{"const": "x"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "optional": {
        "type": "object",
        "properties": {name: {"type": "null"} for name in "abc"},
        "additionalProperties": False,
    },
    "long": {"type": "string", "pattern": '^[a-z"\n]{129,130}$'},  # xgrammar loses JSON's escapes past 128
    "union": {"anyOf": [{"type": "null"}, WEATHER, {"type": "array", "items": {"enum": [1, 2.5]}, "maxItems": 2}]},
}


def as_schema(schema: Any, param: str = "response_format.json_schema.schema") -> JsonSchema:
    return JsonSchema(json.dumps(schema), param)
