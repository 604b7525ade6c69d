"""Calls of tools that are JSON objects: in tags, as Hermes and Qwen have them, or alone, as Llama 3 has them.

Knows how they are spelled; compiles nothing. Where they are not required, text goes on around calls in tags; a text in
which a call of Llama 3 begins is held to that call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cluster.messages import CALL_TAGS, ToolCallGrammar
from router_service.grammar.structural_tags.elements import (
    Format,
    any_text,
    const,
    dispatch,
    either,
    one_of,
    optional,
    repeated,
    sequence,
    token,
)


def hermes(grammar: ToolCallGrammar, excluded: Sequence[str] = ()) -> Format:
    """`excluded`: what text beside calls has none of, where tags are words."""
    tokens = grammar.tokens
    begin, end = CALL_TAGS
    if not grammar.tools:
        return one_of(grammar.answer) if grammar.answer else any_text([*excluded, begin])
    close = const(end) if tokens.end is None else token(tokens.end)
    heads = {f'\n{{"name": {json.dumps(name)}, "arguments": ': schema for name, schema in grammar.tools}
    body = either([sequence(const(head), one_of(schema), const("}\n"), close) for head, schema in heads.items()])
    call = sequence(const(begin) if tokens.calls is None else token(tokens.calls), body)
    if grammar.required or grammar.answer:
        return _alone(call, "\n", grammar)
    if tokens.calls is None:
        return dispatch({begin: body}, excluded, is_repeated=grammar.parallel)
    text = any_text()
    return sequence(text, repeated(sequence(call, text)) if grammar.parallel else optional(call))


def llama3_json(grammar: ToolCallGrammar, excluded: Sequence[str] = ()) -> Format:
    """`excluded`: what text beside calls has none of."""
    if not grammar.tools:
        return one_of(grammar.answer) if grammar.answer else any_text(excluded)
    rests = {
        f'{{"name": {json.dumps(name)}, "parameters": ': sequence(one_of(schema), const("}"))
        for name, schema in grammar.tools
    }
    if grammar.required or grammar.answer:
        calls = _alone(either([sequence(const(head), rest) for head, rest in rests.items()]), "; ", grammar)
    else:
        calls = dispatch(rests, excluded, is_repeated=grammar.parallel)
    return calls if grammar.tokens.calls is None else sequence(optional(token(grammar.tokens.calls)), calls)


def _alone(call: Format, separator: str, grammar: ToolCallGrammar) -> Format:
    """Calls and nothing else, or what an answer may be where they are not required."""
    calls = sequence(call, repeated(sequence(const(separator), call))) if grammar.parallel else call
    return calls if grammar.required or not grammar.answer else either([calls, one_of(grammar.answer)])
