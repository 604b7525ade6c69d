"""Conversations of every shape that clients send, and what each of them means. Data, for the tests of both doors.

A shape is refused, with the field that the error names, or means what its plainest spelling means to the reference
tokenizer of a layout: mistral-common's own, or transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
PLAIN = "hf"  # a Hugging Face template that knows no tools: they are spelled in text
TOOLS = "hf with tools"
V3, V7, TEKKEN, V13 = "mistral v3", "mistral v7", "tekken", "tekken v13"
MISTRAL = (V3, V7, TEKKEN, V13)
LAYOUTS = (PLAIN, TOOLS, *MISTRAL)


@dataclass(frozen=True)
class Shape:
    """One conversation."""

    messages: Sequence[Json]  # as a client sends them over HTTP
    means: Sequence[Json] | None = None  # the plainest spelling; None: as it was sent
    in_text: Sequence[Json] | None = None  # what a template that knows no tools is given; None: the same
    refused: Mapping[str, str] = field(default_factory=dict)  # layout → the field that is wrong
    beyond: Sequence[str] = ()  # layouts whose reference refuses it, and we do not
    tools: Sequence[str] = ()  # names of what may be called
    http_only: bool = False  # chat.proto has no spelling of it


def tool(name: str) -> Json:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


def user(content: Any = "Hello", **fields: Any) -> Json:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any = "Hi!", **fields: Any) -> Json:
    return {"role": "assistant", "content": content, **fields}


def system(content: Any = "Be brief.", **fields: Any) -> Json:
    return {"role": "system", "content": content, **fields}


def developer(content: Any = "Be brief.") -> Json:
    return {"role": "developer", "content": content}


def call(call_id: str = "abcdefghi", name: str = "weather", arguments: Any = '{"city": "Paris"}') -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*them: Json, content: Any = None) -> Json:
    return {"role": "assistant", "content": content, "tool_calls": list(them)}


def result(content: Any = "rain", call_id: Any = "abcdefghi", **fields: Any) -> Json:
    return {"role": "tool", "content": content, "tool_call_id": call_id, **fields}


def parts(*texts: str) -> list[Json]:
    return [{"type": "text", "text": text} for text in texts]


def everywhere(path: str) -> Mapping[str, str]:
    return dict.fromkeys(LAYOUTS, path)


def calls_in_text(text: str) -> Json:
    return assistant(f"[TOOL_CALLS] {text}")


def results_in_text(*texts: str, then: str = "") -> Json:
    return user("\n".join([f"[TOOL_RESULTS] {text}[/TOOL_RESULTS]" for text in texts] + ([then] if then else [])))


UNICODE = "Grüße 👩‍🚀, 你好\u0007"
NOON = result("noon", "bcdefghij")
TIME = call("bcdefghij", "time", "{}")
WEATHER_IN_TEXT = '[{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]'
BOTH_IN_TEXT = WEATHER_IN_TEXT[:-1] + ', {"name": "time", "arguments": {}, "id": "bcdefghij"}]'
RAIN_IN_TEXT = '{"content": "rain", "call_id": "abcdefghi"}'
NOON_IN_TEXT = '{"content": "noon", "call_id": "bcdefghij"}'
ONE_CALL = [user(), calls(call()), result()]
ONE_CALL_IN_TEXT = [user(), calls_in_text(WEATHER_IN_TEXT), results_in_text(RAIN_IN_TEXT)]
TEMPLATES = dict.fromkeys((PLAIN, *MISTRAL), "messages")  # those that look at the order of roles

SHAPES: dict[str, Shape] = {
    # Who speaks, and when.
    "a user": Shape([user()]),
    "system and user": Shape([system(), user()]),
    "developer and user": Shape([developer(), user()], means=[system(), user()]),
    "a system alone": Shape([system()]),
    "system and developer": Shape(
        [system(), developer("In French."), user()],
        means=[system(), system("In French."), user()],
        in_text=[system("Be brief.\n\nIn French."), user()],
    ),
    "several turns": Shape([system(), user(), assistant(), user(), assistant(), user("Bye")]),
    "consecutive users": Shape([user(), user("again")]),
    "consecutive assistants": Shape([user(), assistant(), assistant("Well?"), user()]),
    "assistant first": Shape([assistant(), user()]),
    "system late": Shape([user(), assistant(), system(), user()], refused=TEMPLATES),
    "system last": Shape([user(), assistant(), system()], refused=TEMPLATES),
    "names": Shape(
        [user(name="alice"), assistant(name="bot"), user(name="alice")], means=[user(), assistant(), user()]
    ),
    "nobody": Shape([], refused=everywhere("messages")),
    "an unknown role": Shape([{"role": "king", "content": "x"}], refused=everywhere("messages[0].role")),
    "no role": Shape([user(), {"content": "x"}], refused=everywhere("messages[1].role")),
    "a function's role": Shape(
        [user(), {"role": "function", "name": "f", "content": "x"}], refused=everywhere("messages[1].role")
    ),
    # What they say.
    "text parts": Shape([system(parts("Be ", "brief.")), user(parts("Hel", "lo"))], means=[system(), user()]),
    "parts of an assistant": Shape([user(), assistant(parts("H", "i!")), user()], means=[user(), assistant(), user()]),
    "no parts": Shape([user([])], means=[user("")]),
    "an empty text": Shape([user("")]),
    "an empty system": Shape([system(""), user()]),
    "unicode": Shape([system(UNICODE), user(UNICODE), assistant(UNICODE), user(UNICODE)]),
    "an empty answer": Shape([user(), assistant(""), user("again")], beyond=MISTRAL),
    "an answer of null": Shape(
        [user(), assistant(None), user("again")], means=[user(), assistant(""), user("again")], beyond=MISTRAL
    ),
    "a refusal": Shape(
        [user(), {"role": "assistant", "content": None, "refusal": "No."}, user()],
        means=[user(), assistant("No."), user()],
    ),
    "a refusal part": Shape(
        [user(), assistant([{"type": "refusal", "refusal": "No."}]), user()], means=[user(), assistant("No."), user()]
    ),
    "no refusal": Shape([user(), assistant(refusal=None), user()], means=[user(), assistant(), user()]),
    "a refusal of a user": Shape(
        [user([{"type": "refusal", "refusal": "No."}])],
        refused=everywhere("messages[0].content[0].type"),
        http_only=True,
    ),
    "null of a user": Shape([user(None)], refused=everywhere("messages[0].content"), http_only=True),
    "null of a system": Shape([system(None), user()], refused=everywhere("messages[0].content"), http_only=True),
    "a number": Shape([user(5)], refused=everywhere("messages[0].content"), http_only=True),
    "an image": Shape(
        [user([{"type": "image_url", "image_url": {"url": "x"}}])],
        refused=everywhere("messages[0].content[0].type"),
        http_only=True,
    ),
    "a part without a type": Shape(
        [user([{"text": "x"}])], refused=everywhere("messages[0].content[0]"), http_only=True
    ),
    "a part without text": Shape(
        [user([{"type": "text"}])], refused=everywhere("messages[0].content[0].text"), http_only=True
    ),
    # Calls and results.
    "one call": Shape(ONE_CALL, in_text=ONE_CALL_IN_TEXT),
    "one call, with tools": Shape(
        ONE_CALL,
        tools=["weather", "time"],
        in_text=[
            *ONE_CALL_IN_TEXT[:2],
            user(
                f"[AVAILABLE_TOOLS] {json.dumps([tool('weather'), tool('time')])}[/AVAILABLE_TOOLS]\n"
                'To call tools, answer with [TOOL_CALLS] [{"name": "…", "arguments": {…}}] and nothing else.\n\n'
                f"[TOOL_RESULTS] {RAIN_IN_TEXT}[/TOOL_RESULTS]"
            ),
        ],
    ),
    "a call and its answer": Shape([*ONE_CALL, assistant(), user()], in_text=[*ONE_CALL_IN_TEXT, assistant(), user()]),
    "a call beside an empty text": Shape(
        [user(), calls(call(), content=""), result()], means=ONE_CALL, in_text=ONE_CALL_IN_TEXT
    ),
    "a call beside a text": Shape(
        [user(), calls(call(), content="Let me look."), result()],
        in_text=[user(), assistant(f"Let me look.\n[TOOL_CALLS] {WEATHER_IN_TEXT}"), ONE_CALL_IN_TEXT[2]],
        beyond=(V3, TEKKEN),
    ),
    "a user after a result": Shape(
        [*ONE_CALL, user()],
        in_text=[*ONE_CALL_IN_TEXT[:2], results_in_text(RAIN_IN_TEXT, then="Hello")],
    ),
    "several calls": Shape(
        [user(), calls(call(), TIME), result(), NOON],
        in_text=[user(), calls_in_text(BOTH_IN_TEXT), results_in_text(RAIN_IN_TEXT, NOON_IN_TEXT)],
    ),
    "results out of order": Shape(
        [user(), calls(call(), TIME), NOON, result()],
        in_text=[user(), calls_in_text(BOTH_IN_TEXT), results_in_text(NOON_IN_TEXT, RAIN_IN_TEXT)],
    ),
    "two rounds": Shape(
        [system(), *ONE_CALL, calls(TIME), NOON],
        in_text=[
            system(),
            *ONE_CALL_IN_TEXT,
            calls_in_text('[{"name": "time", "arguments": {}, "id": "bcdefghij"}]'),
            results_in_text(NOON_IN_TEXT),
        ],
    ),
    "a result in parts": Shape(
        [user(), calls(call()), result(parts("ra", "in"))], means=ONE_CALL, in_text=ONE_CALL_IN_TEXT
    ),
    "a result's name": Shape([user(), calls(call()), result(name="weather")], means=ONE_CALL, in_text=ONE_CALL_IN_TEXT),
    "an empty result": Shape(
        [user(), calls(call()), result("")],
        in_text=[*ONE_CALL_IN_TEXT[:2], results_in_text('{"content": "", "call_id": "abcdefghi"}')],
    ),
    "a result that is JSON": Shape(
        [user(), calls(call()), result('{"sky": "grey"}')],
        in_text=[
            *ONE_CALL_IN_TEXT[:2],
            results_in_text('{"content": "{\\"sky\\": \\"grey\\"}", "call_id": "abcdefghi"}'),
        ],
    ),
    "a result in unicode": Shape(
        [user(), calls(call(arguments='{"city": "Pâris 👩‍🚀"}')), result("Grüße 你好")],
        in_text=[
            user(),
            calls_in_text('[{"name": "weather", "arguments": {"city": "Pâris 👩‍🚀"}, "id": "abcdefghi"}]'),
            results_in_text('{"content": "Grüße 你好", "call_id": "abcdefghi"}'),
        ],
    ),
    "arguments that are an object": Shape(
        [user(), calls(call(arguments={"city": "Paris"})), result()], means=ONE_CALL, in_text=ONE_CALL_IN_TEXT
    ),
    "arguments that are empty": Shape(
        [user(), calls(call("bcdefghij", "time", "")), NOON],
        means=[user(), calls(TIME), NOON],
        in_text=[
            user(),
            calls_in_text('[{"name": "time", "arguments": {}, "id": "bcdefghij"}]'),
            results_in_text(NOON_IN_TEXT),
        ],
    ),
    "OpenAI's ids": Shape(
        [user(), calls(call("call_12345678901234")), result(call_id="call_12345678901234")],
        means=[user(), calls(call("8422d43f1")), result(call_id="8422d43f1")],
        in_text=[
            user(),
            calls_in_text(WEATHER_IN_TEXT.replace("abcdefghi", "8422d43f1")),
            results_in_text(RAIN_IN_TEXT.replace("abcdefghi", "8422d43f1")),
        ],
    ),
    "no calls": Shape([user(), assistant(tool_calls=[]), user()], means=[user(), assistant(), user()]),
    "null calls": Shape([user(), assistant(tool_calls=None), user()], means=[user(), assistant(), user()]),
    "a call of a user": Shape([user(tool_calls=[call()])], refused=everywhere("messages[0].tool_calls")),
    "a call without a name": Shape(
        [user(), calls({"id": "abcdefghi", "function": {"arguments": "{}"}}), result()],
        refused=everywhere("messages[1].tool_calls[0].function"),
    ),
    "a result of no call": Shape(
        [user(), {"role": "tool", "content": "rain"}], refused=everywhere("messages[1].tool_call_id")
    ),
    "a result of an empty id": Shape([user(), result(call_id="")], refused=everywhere("messages[1].tool_call_id")),
    "a result that nobody asked for": Shape(
        [user(), result()],
        in_text=[user(), results_in_text(RAIN_IN_TEXT)],
        refused=dict.fromkeys(MISTRAL, "messages"),
    ),
    "a result of another call": Shape(
        [user(), calls(call()), NOON],
        in_text=[*ONE_CALL_IN_TEXT[:2], results_in_text(NOON_IN_TEXT)],
        refused={V13: "messages"},
    ),
    "null of a tool": Shape(
        [user(), calls(call()), result(None)], refused=everywhere("messages[2].content"), http_only=True
    ),
}
