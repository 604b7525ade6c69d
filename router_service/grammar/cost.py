"""Which schemas are cheap to compile for certain, and how a compiled one is tried out. Knows no process or thread."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from cluster.json_schema.numbers import NUMBER_WORDS
from cluster.json_schema.subschemas import subschemas
from cluster.messages import Answer, TextGrammar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

_MAX_PLAIN_ENTRIES = 512  # of lists and objects, over a whole schema
_MAX_PLAIN_ITEMS = 100
_MAX_PLAIN_OPEN_NAMES = 50  # of properties in objects that may have others
_MAX_PLAIN_RANGES = 20  # of numbers; each takes milliseconds to spell
_COSTLY = {
    *("pattern", "patternProperties", "propertyNames", "minLength", "maxLength"),
    *("minProperties", "maxProperties", "multipleOf"),
}
_WALK_TOKENS = 64
_MAX_WALK_S = 3.0  # CPU time
_MAX_TOKEN_S = 0.25  # CPU time


def is_plain(schemas: list[Any]) -> bool:
    """Whether schemas have no word whose cost grows out of proportion, and few words in all."""
    found = [one for schema in schemas for one in subschemas(schema) if isinstance(one, dict)]
    names = sum(len(one.get("properties", ())) for one in found if one.get("additionalProperties") is not False)
    return (
        _num_entries(schemas) <= _MAX_PLAIN_ENTRIES
        and sum(not NUMBER_WORDS.isdisjoint(one) for one in found) <= _MAX_PLAIN_RANGES
        and names <= _MAX_PLAIN_OPEN_NAMES
        and not any(map(_is_costly, found))
    )


def is_program(part: Answer) -> bool:
    """Whether it is an expression or rules, whose cost nobody knows beforehand; a choice's grows with its bytes."""
    return isinstance(part, TextGrammar) and part.kind != "choice"


def walk(compiled: CompiledGrammar, vocab_size: int) -> None:
    """Follow a grammar along random tokens. Raises ValueError when that is impossible, or costs too much."""
    from xgrammar import GrammarMatcher, allocate_token_bitmask

    matcher = GrammarMatcher(compiled)
    bitmask = allocate_token_bitmask(1, vocab_size)
    draw = random.Random(0)
    ends = set(matcher.stop_token_ids)
    begun = time.process_time()
    for position in range(_WALK_TOKENS):
        started = time.process_time()
        matcher.fill_next_token_bitmask(bitmask)
        allowed = _set_bits(bitmask[0].tolist(), vocab_size)
        if not allowed and position == 0:
            raise ValueError("nothing can satisfy it")
        allowed = [token_id for token_id in allowed if token_id not in ends]
        if not allowed:
            return
        matcher.accept_token(draw.choice(allowed))
        now = time.process_time()
        if now - started > _MAX_TOKEN_S or now - begun > _MAX_WALK_S:
            raise ValueError("it takes too long to follow")


def begins(compiled: CompiledGrammar, vocab_size: int) -> bool:
    """Whether there is a first token; a schema that refers only to itself has none."""
    from xgrammar import GrammarMatcher, allocate_token_bitmask

    bitmask = allocate_token_bitmask(1, vocab_size)
    GrammarMatcher(compiled).fill_next_token_bitmask(bitmask)
    return bool(bitmask.any())


def _is_costly(schema: dict[str, Any]) -> bool:
    return not _COSTLY.isdisjoint(schema) or any(
        isinstance(schema.get(word), int) and schema[word] > _MAX_PLAIN_ITEMS for word in ("minItems", "maxItems")
    )


def _num_entries(value: Any) -> int:
    """Entries of all lists and objects in a JSON value."""
    if isinstance(value, list):
        return len(value) + sum(map(_num_entries, value))
    if isinstance(value, dict):
        return len(value) + sum(map(_num_entries, value.values()))
    return 0


def _set_bits(words: list[int], count: int) -> list[int]:
    return [i for i in range(count) if words[i // 32] >> (i % 32) & 1]
