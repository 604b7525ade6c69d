"""What an answer is held to, in the words of OpenAI, vLLM, SGLang, llama.cpp and TGI. Knows fields and no tools.

Each field stands alone: two of them are refused. Null, and where a server has such a default an empty value, asks for
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.errors import InvalidRequest
from cluster.messages import Answer, JsonSchema
from gateway.json_object import parse_object
from gateway.request.protocol import AnswerFields
from gateway.request.structured_schema import MAX_BYTES, checked_schema
from gateway.request.text_grammar import checked_choice, checked_regex, checked_rules

_ANY_OBJECT = '{"type": "object"}'


def read_answer(body: AnswerFields) -> Answer | None:
    """What the answer is held to; None for any text. Raises InvalidRequest."""
    asked = {name: answer for name in _READ if (answer := _asked(body, name)) is not None}
    if len(asked) > 1:
        one, other, *_ = asked
        raise InvalidRequest(f"{other}: not together with {one}", param=other)
    return next(iter(asked.values()), None)


def refuse_beside_calls(body: AnswerFields) -> None:
    """Where the answer is calls of tools. OpenAI's `response_format` is of texts only, and may stand beside them.

    Raises InvalidRequest.
    """
    for name in _READ.keys() - {"response_format"}:
        if _asked(body, name) is not None:
            raise InvalidRequest(f"{name}: not together with a tool_choice that requires calls", param=name)


def _asked(body: AnswerFields, name: str) -> Answer | None:
    value = getattr(body, name)
    return None if value is None else _READ[name](value, name)


def _response_format(response_format: Any, param: str) -> Answer | None:
    if not isinstance(response_format, dict):
        raise InvalidRequest(f"{param}: expected an object", param=param)
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            if response_format.get("schema") is None:
                return JsonSchema(_ANY_OBJECT, param)
            return checked_schema(response_format["schema"], f"{param}.schema")
        case "json_schema":
            return _definition(response_format.get("json_schema"), f"{param}.json_schema")
        case _:
            raise InvalidRequest(f"{param}.type: expected text, json_object or json_schema", param=f"{param}.type")


def _structured_outputs(options: Any, param: str) -> Answer | None:
    """vLLM's StructuredOutputsParams."""
    if not isinstance(options, dict):
        raise InvalidRequest(f"{param}: expected an object", param=param)
    answers: dict[str, Answer] = {}
    for name, value in options.items():
        path = f"{param}.{name}"
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _CONSTRAINTS:
            answer = _CONSTRAINTS[name](value, path)
            if answer is not None:
                answers[path] = answer
        elif name == "disable_any_whitespace":
            _check_bool(value, path)
        elif value is not False:
            raise InvalidRequest(f"{path}: not supported by this server", param=path)
    if len(answers) > 1:
        one, other, *_ = answers
        raise InvalidRequest(f"{other}: not together with {one}", param=other)
    answer = next(iter(answers.values()), None)
    if isinstance(answer, JsonSchema) and options.get("disable_any_whitespace"):
        return replace(answer, any_whitespace=False)
    return answer


def _json_object(value: Any, param: str) -> Answer | None:
    _check_bool(value, param)
    return JsonSchema(_ANY_OBJECT, param) if value else None


def _check_bool(value: Any, param: str) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param}: expected true or false", param=param)


def _schema(schema: Any, param: str) -> Answer:
    """One that may be a text itself."""
    if not isinstance(schema, str):
        return checked_schema(schema, param)
    data = schema.encode(errors="surrogatepass")
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"{param}: at most {MAX_BYTES} bytes, got {len(data)}", param=param)
    try:
        document = parse_object(data, "it")
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: expected a JSON Schema, an object: {error.message}", param=param) from None
    return checked_schema(document, param)


def _definition(definition: Any, param: str) -> Answer:
    """OpenAI's, with a name."""
    if not isinstance(definition, dict):
        raise InvalidRequest(f"{param}: expected an object with a schema", param=param)
    return checked_schema(definition.get("schema"), f"{param}.schema")


def _grammar(grammar: Any, param: str) -> Answer | None:
    """llama.cpp's rules, or TGI's object."""
    if isinstance(grammar, str):
        return checked_rules(grammar, param) if grammar else None
    path = f"{param}.value"
    match grammar:
        case {"type": "json", "value": value}:
            return _schema(value, path)
        case {"type": "json_schema", "value": value}:
            return _definition(value, path)
        case {"type": "regex", "value": value}:
            return checked_regex(value, path)
    raise InvalidRequest(
        f"{param}: expected rules, a string, or {{'type': 'json', 'json_schema' or 'regex', 'value': …}}", param=param
    )


def _unless_empty(read: Callable[[Any, str], Answer]) -> Callable[[Any, str], Answer | None]:
    return lambda value, param: None if value == "" else read(value, param)


_CONSTRAINTS: dict[str, Callable[[Any, str], Answer | None]] = {
    "json": _schema,
    "json_object": _json_object,
    "regex": checked_regex,
    "choice": checked_choice,
    "grammar": checked_rules,
}
_WITHOUT_EFFECT = ("disable_fallback", "_backend", "_backend_was_auto")  # which of vLLM's libraries does it
_READ: dict[str, Callable[[Any, str], Answer | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": checked_regex,
    "guided_choice": checked_choice,
    "guided_grammar": checked_rules,
    "json_schema": _unless_empty(_schema),
    "regex": _unless_empty(checked_regex),
    "ebnf": _unless_empty(checked_rules),
    "grammar": _grammar,
}
