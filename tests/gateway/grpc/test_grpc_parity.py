"""chat.proto says all that the HTTP bodies say, and what it leaves out has its reason here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from cluster.errors import InvalidRequest
from gateway.grpc.door import _chat_body, _completion_body, _embedding_body
from gateway.grpc.proto import chat_pb2
from gateway.grpc.tokenize import _detokenize_body, _tokenize_body
from gateway.http.app import BODIES
from gateway.request.protocol import (
    AnswerFields,
    Body,
    ChatCompletionRequest,
    EmbeddingRequest,
    Message,
    SamplingFields,
)

RPCS: dict[str, tuple[Any, Callable[[Any], Body]]] = {
    "/v1/chat/completions": (chat_pb2.ChatRequest, _chat_body),
    "/v1/completions": (chat_pb2.GenerateRequest, _completion_body),
    "/v1/embeddings": (chat_pb2.EmbedRequest, _embedding_body),
    "/tokenize": (chat_pb2.TokenizeRequest, _tokenize_body),
    "/detokenize": (chat_pb2.DetokenizeRequest, _detokenize_body),
}
WITHOUT_RPC = {
    "/v1/responses": "stores nothing, so it is Chat in other words",
    "/v1/messages": "Anthropic's words for Chat",
    "/v1/messages/count_tokens": "Tokenize has the number",
}
WITHOUT_FIELD: dict[type[Body], dict[str, str]] = {
    SamplingFields: {
        "random_seed": "Mistral's name for `seed`",
        "stream": "ChatStream and GenerateStream",
        "stream_options": "the last chunk of a stream always has the usage",
        "return_token_ids": "every answer has them; Tokenize has the prompt's",
        "return_tokens_as_token_ids": "log-probabilities are of ids",
    },
    AnswerFields: dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "regex", "ebnf", "grammar"),
        "others' names for what `structured_outputs` says",
    ),
    ChatCompletionRequest: {
        "max_completion_tokens": "OpenAI's newer name for `max_tokens`",
        "service_tier": "there is one",
    },
    Message: {
        "refusal": "an assistant's content, whether it refused or not",
        "reasoning": "vLLM's newer name for `reasoning_content`",
    },
    EmbeddingRequest: {
        "encoding_format": "numbers need no spelling here",
        "output_dimension": "Mistral's name for `dimensions`",
    },
}
# Of values: content that is null is the empty string, and text parts are joined, as HTTP's are; a tool that is called
# `none`, `auto`, `any` or `required` cannot be chosen by its name.
VALUES: dict[str, Any] = {
    "truncation_side": "left",
    "role": "assistant",
    "chat_template_kwargs": '{"x": 1}',
    "tool_choice": "none",
    "reasoning_effort": "low",
    "parameters": "{}",
    "json_schema": "{}",
    "output_dtype": "int8",
}


def test_every_body_has_an_rpc_or_a_reason() -> None:
    assert RPCS.keys() | WITHOUT_RPC.keys() == BODIES.keys()
    assert not RPCS.keys() & WITHOUT_RPC.keys()


@pytest.mark.parametrize("path", RPCS)
def test_every_field_of_a_body_has_one_of_a_message_or_a_reason(path: str) -> None:
    """Tokenize had no tools and lost calls: nobody had thought of them a second time."""
    message_type, body_of = RPCS[path]
    bodies = [body_of(message) for message in filled(message_type)]
    body_type = BODIES[path]
    said = set().union(*(body.model_fields_set for body in bodies))
    absent = {name for cls in body_type.__mro__ for name in WITHOUT_FIELD.get(cls, ())}
    assert said == body_type.model_fields.keys() - absent
    assert absent <= body_type.model_fields.keys()
    for message in (message for body in bodies for message in getattr(body, "messages", None) or ()):
        assert message.model_fields_set == Message.model_fields.keys() - WITHOUT_FIELD[Message].keys()


@pytest.mark.parametrize("path", RPCS)
def test_no_field_of_a_message_is_overlooked(path: str) -> None:
    """Without any one of them, however deep, the body is another one, or none."""
    message_type, body_of = RPCS[path]
    for whole in filled(message_type):
        expected = _read(body_of, whole)
        assert expected is not None
        for field_path in leaves(whole):
            without = message_type()
            without.CopyFrom(whole)
            clear(without, field_path)
            assert _read(body_of, without) != expected, field_path


def filled(message_type: Any) -> Iterator[Any]:
    """Messages with every field, one for each alternative of the outermost `oneof`."""
    descriptor = message_type.DESCRIPTOR
    [choices] = [one.fields for one in descriptor.oneofs if len(one.fields) > 1] or [[None]]
    for chosen in choices:
        message = message_type()
        for field in descriptor.fields:
            if field not in choices or field is chosen:
                _fill(message, field)
        yield message


def leaves(message: ProtoMessage, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that are set."""
    for field, value in message.ListFields():
        here = (*path, field.name)
        yield here
        if isinstance(value, ProtoMessage):
            yield from leaves(value, here)
        elif _is_list_of_messages(field):
            yield from leaves(value[0], here)


def clear(message: Any, path: tuple[str, ...]) -> None:
    *parents, name = path
    for parent in parents:
        message = getattr(message, parent)
        message = message if isinstance(message, ProtoMessage) else message[0]
    message.ClearField(name)


def _read(body_of: Callable[[Any], Body], message: Any) -> dict[str, Any] | None:
    try:
        return body_of(message).model_dump()
    except InvalidRequest:  # the field is needed
        return None


def _fill(message: Any, field: FieldDescriptor) -> None:
    value = getattr(message, field.name)
    if field.name == "logit_bias":
        value[5] = 1.0
    elif _is_list_of_messages(field):
        item = value.add()
        item.CopyFrom(next(filled(type(item))))
    elif field.message_type is not None:
        value.CopyFrom(next(filled(type(value))))
    elif field.is_repeated:
        value.append("x" if field.type == FieldDescriptor.TYPE_STRING else 1)
    elif field.type == FieldDescriptor.TYPE_STRING:
        setattr(message, field.name, "json_object" if _is_format(field) else VALUES.get(field.name, "x"))
    else:
        setattr(message, field.name, 1)


def _is_format(field: FieldDescriptor) -> bool:
    return field.full_name == "manta.v1.ResponseFormat.type"


def _is_list_of_messages(field: FieldDescriptor) -> bool:
    return field.is_repeated and field.message_type is not None and not field.message_type.GetOptions().map_entry
