"""Which JSON Schemas are taken: their size, and the words that can be enforced. Compiles nothing.

A word that would be overlooked is refused, so that an answer always validates. Two are taken more loosely: `oneOf` is
`anyOf`, and `format` is a hint, for strings without a pattern or a length. Patterns match the whole string, and beside
`patternProperties` no other names are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn

from cluster.errors import InvalidRequest
from cluster.json_schema.numbers import NUMBER_WORDS, number_ranges
from cluster.json_schema.patterns import literal_prefix, of_length, parse_pattern
from cluster.json_schema.subschemas import LISTS, NAMED, children, target
from cluster.messages import JsonSchema

MAX_BYTES = 65_536
MAX_DEPTH = 24  # schemas within schemas
MAX_SCHEMAS = 2000
MAX_ENUM_VALUES = 2000  # over the whole schema
MAX_PATTERN_CHARS = 512

_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: not isinstance(value, bool) and (isinstance(value, int) or _is_whole(value)),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")  # each says all that its schema may say
_OF_A_TYPE = {
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern"),
    *("unevaluatedProperties", "unevaluatedItems"),
    *NUMBER_WORDS,
}
_REFUSED = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("contains", "minContains", "maxContains", "additionalItems"),
    *("$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor", "$recursiveAnchor"),
}
_COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


class NotEnforceable(InvalidRequest):
    """A schema that asks for more than can be enforced; nothing is wrong with it otherwise."""


def checked_schema(schema: Any, param: str) -> JsonSchema:
    """The schema as it is sent to a coordinator. Raises InvalidRequest with `param`."""
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param}: expected a JSON Schema, an object", param=param)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InvalidRequest(f"{param}: its numbers must be finite", param=param) from None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param}: it has half of a surrogate pair", param=param) from None
    if size > MAX_BYTES:
        raise InvalidRequest(f"{param}: at most {MAX_BYTES} bytes, got {size}", param=param)
    _Check(param).document(schema)
    return JsonSchema(text, param)


class _Check:
    """One walk over one schema."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._num_schemas = 0
        self._num_enum_values = 0
        self._checked: set[int] = (
            set()
        )  # ids of schemas: a reference to anything else would be to what nobody looked at
        self._references: list[tuple[str, Any]] = []  # with their paths

    def document(self, schema: Any) -> None:
        self.schema(schema, "", 1)
        for path, reference in self._references:
            if not isinstance(reference, str):
                self._refuse(path, "expected a string")
            try:
                found = target(schema, reference)
            except ValueError as error:
                self._refuse(path, str(error))
            if not isinstance(found, bool) and id(found) not in self._checked:
                self._refuse(path, "it refers to what is no schema")

    def schema(self, schema: Any, path: str, depth: int) -> None:
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            self._refuse("", f"at most {MAX_SCHEMAS} schemas within one")
        if depth > MAX_DEPTH:
            self._refuse("", f"nested deeper than {MAX_DEPTH} schemas")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            self._refuse(path, "expected an object or a boolean")
        self._checked.add(id(schema))
        for word in sorted(_REFUSED & schema.keys()):
            self._cannot(f"{path}/{word}", "not supported")
        if path and "$id" in schema:
            self._cannot(f"{path}/$id", "not supported within a schema")
        self._shapes(schema, path)
        self._whole(schema, path)
        self._values(schema, path)
        self._counts(schema, path)
        self._numbers(schema, path)
        self._strings(schema, path)
        self._objects(schema, path)
        for name, child in children(schema):
            self.schema(child, path + name, depth + 1)

    def _whole(self, schema: dict[str, Any], path: str) -> None:
        """`$ref`, `anyOf` and the like stand alone, but for `type` beside values."""
        whole = [word for word in _WHOLE if word in schema]
        if not whole:
            return
        others = {*whole[1:], *(_OF_A_TYPE & schema.keys())}
        if "type" in schema and whole[0] not in ("enum", "const"):
            others.add("type")
        if others:
            self._cannot(path, f"{whole[0]!r} and {min(others)!r} in one schema are not supported")
        if "$ref" in schema:
            self._references.append((f"{path}/$ref", schema["$ref"]))
        if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
            self._cannot(f"{path}/allOf", "more than one entry is not supported")

    def _values(self, schema: dict[str, Any], path: str) -> None:
        types = schema.get("type", list(_TYPES))
        types = types if isinstance(types, list) else [types]
        if not types:
            self._refuse(f"{path}/type", "expected one type at least")
        for name in types:
            if not isinstance(name, str) or name not in _TYPES:
                self._refuse(f"{path}/type", f"expected one of {', '.join(_TYPES)}")
        values = schema.get("enum", [])
        if not isinstance(values, list):
            self._refuse(f"{path}/enum", "expected a list")
        self._num_enum_values += len(values)
        if self._num_enum_values > MAX_ENUM_VALUES:
            self._refuse(f"{path}/enum", f"at most {MAX_ENUM_VALUES} values in the whole schema")
        for value in [*values, *([schema["const"]] if "const" in schema else [])]:
            if not any(_TYPES[name](value) for name in types):
                self._refuse(path, "'enum' or 'const' has a value that is not of its 'type'")

    def _counts(self, schema: dict[str, Any], path: str) -> None:
        for word in _COUNTS:
            if word in schema and not (type(schema[word]) is int and 0 <= schema[word] < 2**31):
                self._refuse(f"{path}/{word}", "expected a number of at least 0")
        for least, most in zip(_COUNTS[::2], _COUNTS[1::2], strict=True):
            if schema.get(least, 0) > schema.get(most, 2**31):
                self._refuse(f"{path}/{least}", f"more than {most!r}")
        if schema.get("uniqueItems"):
            self._cannot(f"{path}/uniqueItems", "not supported")
        for word in ("unevaluatedProperties", "unevaluatedItems"):
            if not isinstance(schema.get(word, False), bool):
                self._cannot(f"{path}/{word}", "not supported")

    def _numbers(self, schema: dict[str, Any], path: str) -> None:
        words = NUMBER_WORDS & schema.keys()
        for word in sorted(words):
            if isinstance(schema[word], bool) or not isinstance(schema[word], int | float):
                self._refuse(f"{path}/{word}", "expected a number")
            if word == "multipleOf" and schema[word] <= 0:
                self._refuse(f"{path}/{word}", "expected a number over 0")
        types = schema.get("type", "number")
        for name in {"integer", "number"} & {*(types if isinstance(types, list) else [types])} if words else ():
            try:
                number_ranges(schema, integer=name == "integer")
            except ValueError as error:
                self._cannot(path, str(error))

    def _strings(self, schema: dict[str, Any], path: str) -> None:
        if "pattern" in schema:
            self._pattern(schema["pattern"], f"{path}/pattern")
            try:
                of_length(parse_pattern(schema["pattern"]), schema.get("minLength", 0), schema.get("maxLength"))
            except ValueError as error:
                self._cannot(f"{path}/pattern", str(error))

    def _pattern(self, pattern: Any, path: str) -> None:
        if not isinstance(pattern, str):
            self._refuse(path, "expected a string")
        if len(pattern) > MAX_PATTERN_CHARS:
            self._refuse(path, f"at most {MAX_PATTERN_CHARS} characters")
        try:
            parse_pattern(pattern)
        except ValueError as error:
            self._cannot(path, str(error))

    def _objects(self, schema: dict[str, Any], path: str) -> None:
        required, declared = schema.get("required", []), schema.get("properties", {})
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self._refuse(f"{path}/required", "expected a list of names")
        names = {*declared, *required}
        patterns = schema.get("patternProperties", {})
        for pattern in patterns:
            self._pattern(pattern, f"{path}/patternProperties")
        if patterns and not names <= declared.keys():
            self._cannot(f"{path}/required", "every name must be in 'properties' beside 'patternProperties'")
        if patterns and len(patterns) + len(names) > 1:
            begins = sorted((*names, *map(literal_prefix, patterns)))
            if "" in begins or any(after.startswith(before) for before, after in pairwise(begins)):
                self._cannot(
                    f"{path}/patternProperties", "more than one of its patterns or 'properties' may match a name"
                )
        if "propertyNames" in schema and (names or patterns):
            self._cannot(f"{path}/propertyNames", "not supported where properties have names or patterns")
        is_closed = schema.get("additionalProperties", schema.get("unevaluatedProperties")) is False and not patterns
        if is_closed and not names <= declared.keys():
            self._refuse(f"{path}/required", "a name is not in 'properties', and there may be no others")
        if schema.get("minProperties", 0) > len(names) + (not is_closed):
            self._cannot(f"{path}/minProperties", "more than one property without a fixed name cannot be counted")

    def _shapes(self, schema: dict[str, Any], path: str) -> None:
        """What holds schemas does."""
        for word in LISTS:
            if word in schema and not (isinstance(schema[word], list) and schema[word]):
                self._refuse(f"{path}/{word}", "expected a list of schemas")
        for word in NAMED:
            if not isinstance(schema.get(word, {}), dict):
                self._refuse(f"{path}/{word}", "expected an object")

    def _cannot(self, path: str, message: str) -> NoReturn:
        raise NotEnforceable(*self._error(path, message))

    def _refuse(self, path: str, message: str) -> NoReturn:
        raise InvalidRequest(*self._error(path, message))

    def _error(self, path: str, message: str) -> tuple[str, str]:
        where = f" at #{path[:200]}" if path else ""
        return f"{self._param}{where}: {message}", self._param
