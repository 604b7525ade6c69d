"""Answers in gpt-oss's format, harmony: reasoning and preambles, then a final message or a call. Compiles nothing.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}

A call ends the answer: what comes after it is an end-of-sequence token. A header has the recipient in one of two
places.
"""

from __future__ import annotations

from cluster.messages import Answer, HarmonyGrammar, HarmonyTokens, JsonSchema, ToolCallGrammar
from router_service.grammar.structural_tags.elements import (
    Format,
    any_text,
    const,
    either,
    one_of,
    regex,
    repeated,
    sequence,
    token,
)


def harmony(grammar: HarmonyGrammar) -> Format:
    """Any messages of analysis and preambles, and the one that is held to something."""
    tokens, answer = grammar.tokens, grammar.answer
    calls = []
    if isinstance(answer, ToolCallGrammar):
        calls = [_call(tokens, name, schema) for name, schema in answer.tools]
        final = [] if answer.required else [_final(tokens, answer.answer)]
    else:
        final = [_final(tokens, answer)]
    return sequence(repeated(_before(tokens)), either([*final, *calls]))


def _before(tokens: HarmonyTokens) -> Format:
    """What the model thinks, or tells before it calls, and the beginning of its next message."""
    channel = either([const("analysis"), const("commentary")])
    message = (token(tokens.channel), channel, token(tokens.message), any_text())
    return sequence(*message, token(tokens.end), token(tokens.start), const("assistant"))


def _final(tokens: HarmonyTokens, held_to: Answer | None) -> Format:
    text = any_text() if held_to is None else one_of(held_to)
    return sequence(token(tokens.channel), const("final"), token(tokens.message), text)


def _call(tokens: HarmonyTokens, name: str, schema: JsonSchema) -> Format:
    kinds = [const(" json"), sequence(regex(" ?"), token(tokens.constrain), const("json"))]
    headers = [
        sequence(token(tokens.channel), const(f"commentary to=functions.{name}")),
        sequence(const(f" to=functions.{name}"), token(tokens.channel), const("commentary")),
    ]
    return sequence(either(headers), either(kinds), token(tokens.message), one_of(schema))
