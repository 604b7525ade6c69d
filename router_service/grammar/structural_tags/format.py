"""What xgrammar is told: a Grammar as one of its structural tags. Knows how calls are spelled; compiles nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.json_schema.subschemas import subschemas
from cluster.messages import CALL_TAGS, Answer, Grammar, HarmonyGrammar, JsonSchema, ReasonedGrammar, ToolCallGrammar
from router_service.grammar.rules.schema import schema_grammar
from router_service.grammar.structural_tags.elements import (
    Format,
    any_text,
    const,
    either,
    one_of,
    optional,
    regex,
    sequence,
    token,
)
from router_service.grammar.structural_tags.harmony import harmony
from router_service.grammar.structural_tags.json_calls import hermes, llama3_json

_BLANK: Format = regex(" ?")  # after a special token; Tekken's models write none


def structural_tag(grammar: Grammar) -> str:
    """The structural tag of a grammar, as JSON text. Raises ValueError for a schema that has no grammar."""
    return _tag(_whole(grammar))


def parts(grammar: Grammar) -> tuple[Answer, ...]:
    """Every schema and text grammar that a client wrote."""
    if isinstance(grammar, ReasonedGrammar | HarmonyGrammar):
        return parts(grammar.answer)
    if not isinstance(grammar, ToolCallGrammar):
        return (grammar,)
    return (*(schema for _, schema in grammar.tools), *([grammar.answer] if grammar.answer else []))


def part_tag(part: Answer) -> str:
    """A structural tag for one of `parts` alone. Raises ValueError."""
    return _tag(one_of(part))


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


def _whole(grammar: Grammar, excluded: Sequence[str] = ()) -> Format:
    """`excluded`: what text of the answer's own, that nothing else is held to, has none of."""
    if isinstance(grammar, ReasonedGrammar):
        return _reasoned(grammar)
    if isinstance(grammar, HarmonyGrammar):
        return harmony(grammar)
    if not isinstance(grammar, ToolCallGrammar):
        return one_of(grammar)
    match grammar.tokens.format:
        case "hermes":
            return hermes(grammar, excluded)
        case "llama3_json":
            return llama3_json(grammar, excluded)
        case "mistral":
            return _answer(grammar)
        case "openai":  # within its last message, where no call begins
            return one_of(grammar.answer) if grammar.answer else any_text()


def _reasoned(grammar: ReasonedGrammar) -> Format:
    """The answer after any text up to the tag that ends it, and after a few lines that are the tags'."""
    tags = grammar.tags
    end = const(tags.end) if tags.end_id is None else token(tags.end_id)
    excluded = [tags.end] if tags.end_id is None else []
    if isinstance(grammar.answer, ToolCallGrammar) and grammar.answer.tokens.format == "hermes":
        excluded.append(CALL_TAGS[0])  # a call in the middle of a thought would be read as one
    reasoning = [any_text(excluded), end, regex("\\n{0,2}")]
    if grammar.has_begun:
        return sequence(*reasoning, _whole(grammar.answer))
    answer = _whole(grammar.answer, [tags.begin] if tags.begin_id is None else [])
    begin = const(tags.begin) if tags.begin_id is None else token(tags.begin_id)
    blank = regex("[ \\n]{0,2}")
    return sequence(optional(sequence(blank, begin, *reasoning)), answer)


def _answer(grammar: ToolCallGrammar) -> Format:
    """Calls, or where they are not required also text that holds none, or an answer within its schema."""
    options = []
    if grammar.tools:
        options.append(_marked_calls(grammar))
    if not grammar.required:
        options.append(one_of(grammar.answer) if grammar.answer else _text(grammar))
    return either(options)


def _marked_calls(grammar: ToolCallGrammar) -> Format:
    """A model with a token for it may say something before its calls; without one, calls are all of the answer."""
    tokens = grammar.tokens
    if tokens.calls is None:
        begin = [const(grammar.marker), _list_of_calls(grammar)]
    elif tokens.args is None:
        begin = [token(tokens.calls), _list_of_calls(grammar)]
    else:
        begin = [_spelled_calls(grammar, tokens.calls, tokens.args)]
    if not grammar.required:
        begin.insert(0, any_text() if tokens.calls is not None else regex("[ \\n]*"))
    return sequence(*begin)


def _list_of_calls(grammar: ToolCallGrammar) -> Format:
    calls = [
        {
            "type": "tag",
            "begin": f'{{"name": {json.dumps(name)}, "arguments": ',
            "content": one_of(schema),
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
    return sequence(_BLANK, {"type": "tag", "begin": "[", "content": content, "end": "]"})


def _spelled_calls(grammar: ToolCallGrammar, calls: int, args: int) -> Format:
    """`[TOOL_CALLS]f[ARGS]{…}` once or more."""
    call_id = grammar.tokens.call_id
    identified = [] if call_id is None else [token(call_id), regex(" ?[a-zA-Z0-9]{9}")]
    options = [
        sequence(
            *(token(calls), _BLANK, const(name), *identified),
            *(token(args), _BLANK, one_of(schema)),
        )
        for name, schema in grammar.tools
    ]
    one = either(options)
    return {"type": "plus", "content": one} if grammar.parallel else one


def _text(grammar: ToolCallGrammar) -> Format:
    """Any text; if the marker is text itself, one that does not begin with it: rule i has seen i characters of it."""
    if grammar.tokens.calls is not None:
        return any_text()
    rules = ["root ::= [ \\n]* seen0", "any ::= [\\x00-\\U0010ffff]*"]
    for i, char in enumerate(grammar.marker):
        blanks = "" if i else " \\n"
        other = f"[^{_in_class(char)}{blanks}] any"
        more = f' | "{char}" seen{i + 1}' if i + 1 < len(grammar.marker) else ""
        rules.append(f'seen{i} ::= "" | {other}{more}')
    return {"type": "grammar", "grammar": "\n".join(rules)}


def _in_class(char: str) -> str:
    return f"\\{char}" if char in "[]^-\\" else char
