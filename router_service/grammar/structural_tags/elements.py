"""What structural tags are put together from, in xgrammar's words. Knows nothing of calls and of reasoning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.messages import Answer, JsonSchema
from router_service.grammar.rules.schema import schema_grammar
from router_service.grammar.rules.texts import text_rules

Format = dict[str, Any]


def sequence(*elements: Format) -> Format:
    """One after another."""
    return {"type": "sequence", "elements": list(elements)}


def either(options: Sequence[Format]) -> Format:
    """One of them."""
    return options[0] if len(options) == 1 else {"type": "or", "elements": list(options)}


def optional(content: Format) -> Format:
    """It, or nothing."""
    return {"type": "optional", "content": content}


def repeated(content: Format) -> Format:
    """It any number of times, or never."""
    return {"type": "star", "content": content}


def const(text: str) -> Format:
    """That text."""
    return {"type": "const_string", "value": text}


def regex(pattern: str) -> Format:
    """Text that matches."""
    return {"type": "regex", "pattern": pattern}


def token(token_id: int) -> Format:
    """A special token: no text matches one."""
    return {"type": "token", "token": token_id}


def any_text(excluded: Sequence[str] = ()) -> Format:
    """Text that holds none of these words. Where there are some, special tokens are let through as well."""
    return {"type": "any_text", "excludes": list(excluded)}


def dispatch(rests: Mapping[str, Format], excluded: Sequence[str], *, is_repeated: bool) -> Format:
    """The same, and once it holds one of the words of `rests`, what belongs after it: then more text, or the end."""
    rules = [[word, rest] for word, rest in rests.items()]
    return {"type": "dispatch", "rules": rules, "loop": is_repeated, "excludes": list(excluded)}


def one_of(part: Answer) -> Format:
    """What a client's schema or text grammar allows. Raises ValueError where it has no grammar."""
    if isinstance(part, JsonSchema):
        rules = schema_grammar(json.loads(part.text), any_whitespace=part.any_whitespace)
    else:
        rules = text_rules(part)
    return {"type": "grammar", "grammar": rules}
