"""What xgrammar is told: a Grammar as one of its structural tags. Knows how calls are spelled; compiles nothing."""

from __future__ import annotations

import json
from typing import Any

from cluster.json_schema.subschemas import subschemas
from cluster.messages import Answer, Grammar, JsonSchema, ReasonedGrammar, ToolCallGrammar
from router_service.grammar.schema import schema_grammar
from router_service.grammar.texts import text_rules

Format = dict[str, Any]

_BLANK: Format = {"type": "regex", "pattern": " ?"}  # after a special token; Tekken's models write none


def structural_tag(grammar: Grammar) -> str:
    """The structural tag of a grammar, as JSON text. Raises ValueError for a schema that has no grammar."""
    return _tag(_whole(grammar))


def parts(grammar: Grammar) -> tuple[Answer, ...]:
    """Every schema and text grammar that a client wrote."""
    if isinstance(grammar, ReasonedGrammar):
        return parts(grammar.answer)
    if not isinstance(grammar, ToolCallGrammar):
        return (grammar,)
    return (*(schema for _, schema in grammar.tools), *([grammar.answer] if grammar.answer else []))


def part_tag(part: Answer) -> str:
    """A structural tag for one of `parts` alone. Raises ValueError."""
    return _tag(_one(part))


def pattern_tags(part: Answer) -> list[str]:
    """One for every pattern and length in a schema, also where a short walk would not come by. Raises ValueError."""
    found: list[Any] = []
    schemas = subschemas(json.loads(part.text)) if isinstance(part, JsonSchema) else ()
    for one in filter(lambda one: isinstance(one, dict), schemas):
        limits = {word: one[word] for word in ("pattern", "minLength", "maxLength") if word in one}
        found += [{"type": "string", **limits}] if limits else []
        found += [{"type": "string", "pattern": name} for name in one.get("patternProperties", ())]
    grammars = dict.fromkeys(map(schema_grammar, found))
    return [_tag({"type": "grammar", "grammar": grammar}) for grammar in grammars]


def _tag(content: Format) -> str:
    return json.dumps({"type": "structural_tag", "format": content})


def _whole(grammar: Grammar) -> Format:
    if isinstance(grammar, ReasonedGrammar):
        return _reasoned(grammar)
    return _answer(grammar) if isinstance(grammar, ToolCallGrammar) else _one(grammar)


def _reasoned(grammar: ReasonedGrammar) -> Format:
    """The answer after any text up to the tag that ends it, and after a few lines that are the tags'."""
    tags = grammar.tags
    end = _const(tags.end) if tags.end_id is None else _token(tags.end_id)
    thought = {"type": "any_text", "excludes": [tags.end] if tags.end_id is None else []}
    reasoning = [thought, end, {"type": "regex", "pattern": "\\n{0,2}"}]
    answer = _whole(grammar.answer)
    if grammar.has_begun:
        return _sequence(*reasoning, answer)
    begin = _const(tags.begin) if tags.begin_id is None else _token(tags.begin_id)
    blank = {"type": "regex", "pattern": "[ \\n]{0,2}"}
    return _sequence({"type": "optional", "content": _sequence(blank, begin, *reasoning)}, answer)


def _answer(grammar: ToolCallGrammar) -> Format:
    """Calls, or where they are not required also text that holds none, or an answer within its schema."""
    options = []
    if grammar.tools:
        options.append(_marked_calls(grammar))
    if not grammar.required:
        options.append(_one(grammar.answer) if grammar.answer else _text(grammar))
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
            "content": _one(schema),
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
            *(_token(args), _BLANK, _one(schema)),
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


def _one(part: Answer) -> Format:
    if isinstance(part, JsonSchema):
        rules = schema_grammar(json.loads(part.text), any_whitespace=part.any_whitespace)
    else:
        rules = text_rules(part)
    return {"type": "grammar", "grammar": rules}
