"""What xgrammar is told: a Grammar as one of its structural tags. Knows JSON Schema's words; compiles nothing.

JSON is written on one line or close to it: between two elements comes at most one whitespace character, so a model
cannot spend its tokens on blanks.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.json_schema.subschemas import LISTS, NAMED, ONE
from cluster.messages import Grammar, JsonSchema, ToolCallGrammar

Format = dict[str, Any]

_MAX_BLANKS = 1
_BLANK: Format = {"type": "regex", "pattern": " ?"}  # after a special token; Tekken's models write none
_WORDS = {  # of one type only; a schema that has them is read as of that type
    "object": {
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    },
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_FORMATS = {
    *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uri-reference", "uuid")
}


def structural_tag(grammar: Grammar) -> str:
    """The structural tag of a grammar, as JSON text."""
    return _tag(_json(json.loads(grammar.text)) if isinstance(grammar, JsonSchema) else _answer(grammar))


def schemas(grammar: Grammar) -> tuple[JsonSchema, ...]:
    """Every schema that a client wrote."""
    if isinstance(grammar, JsonSchema):
        return (grammar,)
    return (*(schema for _, schema in grammar.tools), *([grammar.answer] if grammar.answer else []))


def schema_tags(grammar: Grammar) -> list[str]:
    """A structural tag for each of `schemas` alone."""
    return [_tag(_json(json.loads(schema.text))) for schema in schemas(grammar)]


def _tag(content: Format) -> str:
    return json.dumps({"type": "structural_tag", "format": content})


def _answer(grammar: ToolCallGrammar) -> Format:
    """Calls, or where they are not required also text that holds none, or an answer within its schema."""
    options = []
    if grammar.tools:
        options.append(_marked_calls(grammar))
    if not grammar.required:
        options.append(_json(json.loads(grammar.answer.text)) if grammar.answer else _text(grammar))
    return options[0] if len(options) == 1 else {"type": "or", "elements": options}


def _marked_calls(grammar: ToolCallGrammar) -> Format:
    """A model with a token for it may say something before its calls; without one, calls are all of the answer."""
    tokens = grammar.tokens
    if tokens.calls is None:
        begin = [_const(grammar.marker), _list_of_calls(grammar)]
    elif tokens.args is None:
        begin = [_token(tokens.calls), _list_of_calls(grammar)]
    else:
        begin = [_spelled_calls(grammar, tokens.calls, tokens.args)]
    if not grammar.required:
        begin.insert(0, {"type": "any_text"} if tokens.calls is not None else {"type": "regex", "pattern": "[ \\n]*"})
    return _sequence(*begin)


def _list_of_calls(grammar: ToolCallGrammar) -> Format:
    calls = [
        {
            "type": "tag",
            "begin": f'{{"name": {json.dumps(name)}, "arguments": ',
            "content": _json(json.loads(schema.text)),
            "end": "}",
        }
        for name, schema in grammar.tools
    ]
    content = {
        "type": "tags_with_separator",
        "tags": calls,
        "separator": ", ",
        "at_least_one": True,
        "stop_after_first": not grammar.parallel,
    }
    return _sequence(_BLANK, {"type": "tag", "begin": "[", "content": content, "end": "]"})


def _spelled_calls(grammar: ToolCallGrammar, calls: int, args: int) -> Format:
    """`[TOOL_CALLS]f[ARGS]{…}` once or more."""
    call_id = grammar.tokens.call_id
    identified = [] if call_id is None else [_token(call_id), {"type": "regex", "pattern": " ?[a-zA-Z0-9]{9}"}]
    options = [
        _sequence(
            *(_token(calls), _BLANK, _const(name), *identified),
            *(_token(args), _BLANK, _json(json.loads(schema.text))),
        )
        for name, schema in grammar.tools
    ]
    one = options[0] if len(options) == 1 else {"type": "or", "elements": options}
    return {"type": "plus", "content": one} if grammar.parallel else one


def _text(grammar: ToolCallGrammar) -> Format:
    """Any text; if the marker is text itself, one that does not begin with it: rule i has seen i characters of it."""
    if grammar.tokens.calls is not None:
        return {"type": "any_text"}
    rules = ["root ::= [ \\n]* seen0", "any ::= [\\x00-\\U0010ffff]*"]
    for i, char in enumerate(grammar.marker):
        blanks = "" if i else " \\n"
        other = f"[^{_in_class(char)}{blanks}] any"
        more = f' | "{char}" seen{i + 1}' if i + 1 < len(grammar.marker) else ""
        rules.append(f'seen{i} ::= "" | {other}{more}')
    return {"type": "grammar", "grammar": "\n".join(rules)}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _token(token_id: int) -> Format:
    return {"type": "token", "token": token_id}


def _in_class(char: str) -> str:
    return f"\\{char}" if char in "[]^-\\" else char


def _json(schema: Any) -> Format:
    return {"type": "json_schema", "json_schema": _spelled_out(schema), "max_whitespace_cnt": _MAX_BLANKS}


def _spelled_out(schema: Any) -> Any:
    """The same schema, for what xgrammar gets wrong.

    It overlooks a required property that `properties` does not declare, lets raw control characters into strings that
    have a length, overlooks words without a type, and knows some formats no better than a guess.
    """
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for word in ONE:
        if word in result:
            result[word] = _spelled_out(result[word])
    for word in LISTS:
        if isinstance(result.get(word), list):
            result[word] = [_spelled_out(entry) for entry in result[word]]
    for word in NAMED:
        if isinstance(result.get(word), dict):
            result[word] = {name: _spelled_out(entry) for name, entry in result[word].items()}
    if result.get("format") not in _FORMATS:
        result.pop("format", None)
    low, high = result.pop("minLength", 0), result.pop("maxLength", None)
    if low or high is not None:
        result["pattern"] = f"^.{{{low},{'' if high is None else high}}}$"
    if not result.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}:
        result |= next(({"type": name} for name, words in _WORDS.items() if words & result.keys()), {})
    required, declared = schema.get("required"), schema.get("properties", {})
    if isinstance(required, list) and isinstance(declared, dict):
        additional = result.get("additionalProperties", True)
        missing = {name: additional for name in required if isinstance(name, str) and name not in declared}
        if missing:
            result["properties"] = {**result.get("properties", {}), **missing}
    return result
