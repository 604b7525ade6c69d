"""Where a JSON Schema has schemas inside: the one walk for everybody. Knows which words hold them, not what they mean.

A property may be called `items`, `pattern` or `$ref`, and a `const` may look like a schema: a dict is a schema only
where this module finds one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

ONE = ("items", "additionalProperties", "propertyNames")  # words that hold a schema,
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of schemas,
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # an object of schemas by name


def children(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right below, each with its JSON Pointer from here, `/properties/a`. Skips what has a wrong type."""
    if not isinstance(schema, dict):
        return
    for word in ONE:
        if word in schema:
            yield f"/{word}", schema[word]
    for word in LISTS:
        if isinstance(schema.get(word), list):
            yield from ((f"/{word}/{i}", child) for i, child in enumerate(schema[word]))
    for word in NAMED:
        if isinstance(schema.get(word), dict):
            yield from ((f"/{word}/{_escaped(name)}", child) for name, child in schema[word].items())


def subschemas(schema: Any) -> Iterator[Any]:
    """The schema and all below, none before the one that holds it."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += [child for _, child in children(one)]


def target(root: Any, reference: str) -> Any:
    """What `#/$defs/a` is in the schema `root`; `~0`, `~1` and %-encoding are read. Raises ValueError."""
    if not (reference == "#" or reference.startswith("#/")):
        raise ValueError("only references within the schema are supported, '#/$defs/…'")
    found = root
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and len(name) < 6 and int(name) < len(found):
            found = found[int(name)]
        else:
            raise ValueError("it refers to nothing in the schema")
    return found


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
