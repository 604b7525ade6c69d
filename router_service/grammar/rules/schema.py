"""Spells a JSON Schema as a grammar of its instances. Knows the words that the doors let through; compiles nothing.

JSON is written on one line or close to it: between two elements comes at most one whitespace character, so a model
cannot spend its tokens on blanks. Properties come in the order in which they are declared, each once. Where the grammar
allows less than the schema, an answer still validates: beside what `properties` declares, be it nothing, there are
others only where the schema speaks of them, else a small model would add some for ever; their names have no escapes,
and beside `patternProperties` there are none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cluster.ebnf import choice, literal, repeat
from cluster.json_schema.numbers import NUMBER_WORDS, number_ranges
from cluster.json_schema.patterns import of_length, parse_pattern
from cluster.json_schema.subschemas import target
from router_service.grammar.rules.numbers import ANY_INTEGER, ANY_NUMBER, numbers
from router_service.grammar.rules.rules import Rules
from router_service.grammar.rules.strings import (
    any_string,
    key_but,
    string_of_format,
    string_of_length,
    string_of_pattern,
)

_TYPES = ("object", "array", "string", "number", "boolean", "null")
_WORDS = {  # of one type only; a schema that has them and no `type` is read as of that type
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties"),
    },
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "minLength", "maxLength"},
    "number": NUMBER_WORDS,
}
_OTHERS = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"}
_ANYTHING = {"type": list(_TYPES)}
_MAX_COUNTED = 10_000  # properties, times how many of them are counted


def schema_grammar(schema: Any, *, any_whitespace: bool = True) -> str:
    """The rules in EBNF. Raises ValueError with why there are none."""
    document = _Document(schema, any_whitespace)
    root = document.value(schema)
    if root is None:
        raise ValueError("nothing can satisfy it")
    document.finish()
    return document.rules.text(root)


class _Document:
    """One schema, to which its references refer. Where nothing fits, there is no rule: None."""

    def __init__(self, root: Any, any_whitespace: bool) -> None:
        self.rules = Rules()
        self._root = root
        self._names: dict[tuple[int, bool], str] = {}  # of what is referred to
        self._waiting: list[tuple[str, Any, bool]] = []
        self._blank = self.rules.add("[ \\n\\r\\t]?") if any_whitespace else '""'

    def finish(self) -> None:
        """Spell what was referred to, one after the other: references may be a long chain."""
        while self._waiting:
            name, schema, is_key = self._waiting.pop()
            self.rules.set(name, self.value(schema, is_key=is_key) or name)  # `name ::= name` never ends

    def value(self, schema: Any, *, is_key: bool = False) -> str | None:
        """An instance; as a key it is a string."""
        if schema is False:
            return None
        if schema is True or not schema:
            return any_string(self.rules) if is_key else self._reference(_ANYTHING)
        if "$ref" in schema:
            return self._reference(target(self._root, schema["$ref"]), is_key=is_key)
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema:
                return self._choice(self.value(option, is_key=is_key) for option in schema[word])
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return self._choice(self.rules.add(literal(_dumps(one))) for one in values if _fits(one, is_key))
        types = schema.get("type") or next((name for name, words in _WORDS.items() if words & schema.keys()), _TYPES)
        types = [types] if isinstance(types, str) else types
        return self._choice(self._of_type(schema, name) for name in types if not is_key or name == "string")

    def _reference(self, schema: Any, *, is_key: bool = False) -> str:
        key = (id(schema), is_key)
        if key not in self._names:
            self._names[key] = self.rules.reserve()
            self._waiting.append((self._names[key], schema, is_key))
        return self._names[key]

    def _choice(self, options: Iterable[str | None]) -> str | None:
        names = list(dict.fromkeys(name for name in options if name is not None))
        return names[0] if len(names) == 1 else self.rules.add(choice(names)) if names else None

    def _of_type(self, schema: dict[str, Any], name: str) -> str | None:
        match name:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema)
            case "boolean":
                return self.rules.add('"true" | "false"')
            case "null":
                return self.rules.add('"null"')
            case "number" | "integer":
                return self._number(schema, integer=name == "integer")
            case _:
                raise ValueError(f"{name!r} is no type")

    def _string(self, schema: dict[str, Any]) -> str:
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if "pattern" in schema:
            return string_of_pattern(self.rules, of_length(parse_pattern(schema["pattern"]), low, high))
        if low or high is not None:
            return string_of_length(self.rules, low, high)
        return string_of_format(self.rules, schema.get("format")) or any_string(self.rules)

    def _number(self, schema: dict[str, Any], *, integer: bool) -> str:
        if NUMBER_WORDS.isdisjoint(schema):
            return self.rules.add(ANY_INTEGER if integer else ANY_NUMBER)
        return self.rules.add(numbers(self.rules, number_ranges(schema, integer=integer)))

    def _array(self, schema: dict[str, Any]) -> str | None:
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        first = [self.value(one) for one in schema.get("prefixItems", ())]
        other = self.value(schema.get("items", schema.get("unevaluatedItems", True)))
        if None in first:
            first, other = first[: first.index(None)], None
        elements = [f"{element} {self._blank}" for element in first]
        # What may follow all of the first ones, then from the last to the first what may follow those before it.
        tail = self._more(None if other is None else f"{other} {self._blank}", len(first), low, high, begun=bool(first))
        for i in reversed(range(len(elements))):
            comma = f'"," {self._blank} ' if i else ""
            one = None if tail is None or i == high else f"{comma}{elements[i]} {tail}"
            tail = self._optional(one, needed=i < low)
        return None if tail is None else self._enclosed("[", tail, "]")

    def _object(self, schema: dict[str, Any]) -> str | None:
        low, high = schema.get("minProperties", 0), schema.get("maxProperties")
        required, additional = set(schema.get("required", ())), _additional(schema)
        declared = {**dict.fromkeys(schema.get("required", ()), additional), **schema.get("properties", {})}
        declared = {name: declared[name] for name in (*schema.get("properties", ()), *declared)}
        counts = range(min(len(declared), max(low, high or 0)) + 1)  # of properties before; the last: or more
        if len(declared) * len(counts) > _MAX_COUNTED:
            raise ValueError("it has too many properties to count them")
        other = self._other_property(schema, declared)
        # What may follow when so many of the declared ones are written, and anything at all is. Others count once: they
        # may have the same name.
        tails = {
            (count, begun): self._more(other if low - count <= 1 else None, count, low, high, begun=begun)
            for count in counts
            for begun in (False, True)
        }
        for name, child in reversed(declared.items()):
            value = self.value(child)
            pair = None if value is None else self._pair(literal(_dumps(name)), value)
            before = {}
            for count, begun in tails:
                tail = tails[min(count + 1, counts[-1]), True]
                comma = f'"," {self._blank} ' if begun else ""
                one = None if pair is None or tail is None or count == high else f"{comma}{pair} {tail}"
                without = None if name in required else tails[count, begun]
                before[count, begun] = self._choice(self._rule(option) for option in (one, without))
            tails = before
        tail = tails[0, False]
        return None if tail is None else self._enclosed("{", tail, "}")

    def _other_property(self, schema: dict[str, Any], declared: dict[str, Any]) -> str | None:
        """Name and value of one that is not declared."""
        by_pattern = schema.get("patternProperties", {})
        speaks = not _OTHERS.isdisjoint(schema) or schema.get("minProperties", 0) > len(declared)
        if not speaks and (declared or "properties" in schema):
            return None
        if by_pattern:
            pairs = [(string_of_pattern(self.rules, parse_pattern(name)), one) for name, one in by_pattern.items()]
        else:
            names = self.value(schema["propertyNames"], is_key=True) if "propertyNames" in schema else None
            if names is None and schema.get("propertyNames", True) is True:
                names = key_but(self.rules, declared) if declared else any_string(self.rules)
            pairs = [] if names is None else [(names, _additional(schema))]
        options = [(key, self.value(one)) for key, one in pairs]
        return self._choice(self._rule(self._pair(key, value)) for key, value in options if value is not None)

    def _more(self, one: str | None, count: int, low: int, high: int | None, *, begun: bool) -> str | None:
        """What may follow `count` entries of a list or an object, if all others are like `one`."""
        needed, most = max(0, low - count), None if high is None else max(0, high - count)
        if one is None or most == 0:
            return '""' if not needed else None
        if most is not None and needed > most:
            return None
        following = f'("," {self._blank} {one})'
        if begun:
            return repeat(following, needed, most)
        rest = repeat(following, max(0, needed - 1), None if most is None else most - 1)
        return self._optional(f"{one} {rest}", needed=needed > 0)

    def _optional(self, one: str | None, *, needed: bool) -> str | None:
        if one is None:
            return None if needed else '""'
        return self.rules.add(one if needed else f"({one})?")

    def _rule(self, body: str | None) -> str | None:
        return None if body is None else self.rules.add(body)

    def _pair(self, key: str, value: str) -> str:
        return f'{key} {self._blank} ":" {self._blank} {value} {self._blank}'

    def _enclosed(self, begin: str, inside: str, end: str) -> str:
        return self.rules.add(f'"{begin}" {self._blank} {inside} "{end}"')


def _additional(schema: dict[str, Any]) -> Any:
    return schema.get("additionalProperties", schema.get("unevaluatedProperties", True))


def _fits(value: Any, is_key: bool) -> bool:
    return isinstance(value, str) or not is_key


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
