"""Both doors make the same of every conversation, with every kind of tokenizer: what its own reference makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Reference

from cluster.checkpoint.vocabulary import tokenizer_file
from cluster.config import GatewayConfig
from gateway.coordinators.health import Health
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway import vocabularies
from tests.gateway.doubles import (
    ScriptedCoordinator,
    http_server,
    model_card,
    ready,
    tokens_script,
    write_tokenizer,
)
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.message_shapes import LAYOUTS, MISTRAL, PLAIN, SHAPES, TEKKEN, TOOLS, V3, V7, V13, Json, Shape, tool
from tests.gateway.text.test_forged_turns import mistral_tokenizer

FILES = {
    V3: "mistral_instruct_tokenizer_240323.model.v3",
    V7: "mistral_instruct_tokenizer_241114.model.v7",
    TEKKEN: "tekken_240718.json",
    V13: "v13",
}
TokenIds = tuple[int, ...]


class Doors:
    """Both, in front of a model of every layout."""

    def __init__(self, root: Path) -> None:
        directories = {layout: root / layout.replace(" ", "-") for layout in LAYOUTS}
        for directory in directories.values():
            directory.mkdir()
        write_tokenizer(directories[PLAIN])
        vocabularies.write(directories[TOOLS], "byte level", vocabularies.TOOLS)
        tokenizers: dict[str, Any] = {
            layout: mistral_tokenizer(directories[layout], FILES[layout]) for layout in MISTRAL
        }
        tokenizers |= {layout: HuggingFaceTokenizer(directories[layout]) for layout in (PLAIN, TOOLS)}
        cards = tuple(
            model_card(
                directories[layout],
                name=layout,
                aliases=(),
                application=layout,
                max_model_len=4096,
                vocab_size=tokenizers[layout].vocab_size,
            )
            for layout in LAYOUTS
        )
        self.coordinator = ScriptedCoordinator(tokens_script([]))
        self.frontend = Frontend(
            GatewayConfig(),
            cards,
            tokenizers,
            dict.fromkeys(tokenizers, self.coordinator),
            Health(cards, ready),
        )
        self._references: dict[str, Any] = {
            layout: Reference.from_file(str(tokenizer_file(directory))) if layout in MISTRAL else tokenizers[layout]._hf
            for layout, directory in directories.items()
        }
        self.http: Any = None
        self.grpc: Any = None

    def reference(self, layout: str, messages: Sequence[Json], tools: Sequence[Json]) -> TokenIds:
        """What the tokenizer's own library makes of a conversation."""
        own = self._references[layout]
        if layout in MISTRAL:
            request = ChatCompletionRequest.from_openai([dict(m) for m in messages], tools=list(tools) or None)
            return tuple(own.encode_chat_completion(request).tokens)
        return tuple(
            own.apply_chat_template(
                as_transformers_documents(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                return_dict=False,
            )
        )

    def continued(self, layout: str, messages: Sequence[Json]) -> TokenIds:
        """What it makes of one whose last message is open-ended."""
        own = self._references[layout]
        if layout in MISTRAL:
            last = AssistantMessage(content=messages[-1]["content"], prefix=True)
            chat = [UserMessage(content=message["content"]) for message in messages[:-1]]
            request = ChatCompletionRequest(messages=[*chat, last] if last.content else chat)
            return tuple(own.encode_chat_completion(request).tokens)
        return tuple(own.apply_chat_template(list(messages), continue_final_message=True, return_dict=False))

    def answers(self, layout: str, shape: Shape) -> Iterator[tuple[str, TokenIds | str]]:
        """Of every door: what became of the prompt, or what the error says."""
        tools = [tool(name) for name in shape.tools]
        body = {"model": layout, "messages": list(shape.messages), "tools": tools}
        yield "HTTP chat", self._chat(body)
        yield "HTTP tokenize", self._tokenize(body)
        if not shape.http_only:
            messages = [_proto(message) for message in shape.messages]
            yield "gRPC chat", self._grpc_chat(layout, messages, tools)
            yield "gRPC tokenize", self._grpc_tokenize(layout, messages, tools)

    def _chat(self, body: Json) -> TokenIds | str:
        answer = self.http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
        return self._last_prompt() if answer.status_code == 200 else _param(answer)

    def _tokenize(self, body: Json) -> TokenIds | str:
        answer = self.http.post("/tokenize", json=body)
        return tuple(answer.json()["tokens"]) if answer.status_code == 200 else _param(answer)

    def _grpc_chat(self, layout: str, messages: list[Any], tools: list[Json]) -> TokenIds | str:
        sampling = chat_pb2.Sampling(max_tokens=1)
        request = chat_pb2.ChatRequest(
            model=layout, messages=messages, tools=[_proto_tool(one) for one in tools], sampling=sampling
        )
        try:
            self.grpc.Chat(request, timeout=30)
        except grpc.RpcError as error:
            return _details(error)
        return self._last_prompt()

    def _grpc_tokenize(self, layout: str, messages: list[Any], tools: list[Json]) -> TokenIds | str:
        conversation = chat_pb2.Conversation(messages=messages, tools=[_proto_tool(one) for one in tools])
        try:
            answer = self.grpc.Tokenize(chat_pb2.TokenizeRequest(model=layout, conversation=conversation), timeout=30)
        except grpc.RpcError as error:
            return _details(error)
        return tuple(answer.token_ids)

    def _last_prompt(self) -> TokenIds:
        return self.coordinator.requests.pop().prompt_token_ids


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    doors = Doors(tmp_path_factory.mktemp("layouts"))
    with (
        http_server(doors.frontend) as url,
        httpx.Client(base_url=url, timeout=30) as doors.http,
        grpc_server(doors.frontend) as channel,
    ):
        doors.grpc = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        yield doors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_means_the_same_everywhere(doors: Doors, name: str, layout: str) -> None:
    shape = SHAPES[name]
    if layout in shape.refused:
        path = shape.refused[layout]
        for door, answer in doors.answers(layout, shape):
            assert isinstance(answer, str), door
            assert path == answer if door.startswith("HTTP") else path in answer, door
        return
    means, tools = shape.means or shape.messages, [tool(name) for name in shape.tools]
    if layout == PLAIN and shape.in_text is not None:
        means, tools = shape.in_text, []
    answers = list(doors.answers(layout, shape))
    if layout in shape.beyond:
        with pytest.raises(MistralCommonException):
            doors.reference(layout, means, tools)
        expected = answers[0][1]
        assert isinstance(expected, tuple)
    else:
        expected = doors.reference(layout, means, tools)
    assert expected
    for door, answer in answers:
        assert answer == expected, door


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["The best one is", ""])
def test_an_answer_goes_on_from_the_last_message(doors: Doors, layout: str, text: str) -> None:
    """As transformers and mistral-common make prompts of it, whichever name it is asked for by; it was refused."""
    asked = {"role": "user", "content": "Which cheese?"}
    last = {"role": "assistant", "content": text}
    expected = doors.continued(layout, [asked, last])
    by_prefix = [asked, {**last, "prefix": True}]
    for fields in (
        {"messages": by_prefix},
        {"messages": [asked, last], "continue_final_message": True},
        {"messages": [asked, last], "continue_final_message": True, "add_generation_prompt": False},
        *([{"messages": [asked, last]}] if layout in MISTRAL else []),  # the only way that these formats know
    ):
        body = {"model": layout, **fields}
        assert doors._chat(body) == doors._tokenize(body) == expected, fields
    messages = [_proto(asked), chat_pb2.Message(role="assistant", content=text, prefix=True)]
    assert doors._grpc_chat(layout, messages, []) == doors._grpc_tokenize(layout, messages, []) == expected
    conversation = chat_pb2.Conversation(messages=[_proto(asked), _proto(last)])
    request = chat_pb2.TokenizeRequest(model=layout, conversation=conversation, continue_final_message=True)
    assert tuple(doors.grpc.Tokenize(request).token_ids) == expected


@pytest.mark.parametrize("layout", MISTRAL)
def test_what_is_said_to_a_template_is_done_or_refused_where_there_is_none(doors: Doors, layout: str) -> None:
    """Mistral's own formats passed over variables, and that a last answer is not to be continued."""
    asked, last = {"role": "user", "content": "Which cheese?"}, {"role": "assistant", "content": "The best"}
    plain = {"model": layout, "messages": [asked]}
    answered = {"model": layout, "messages": [asked, last]}
    for ask in (doors._chat, doors._tokenize):
        assert ask(plain | {"chat_template_kwargs": {"style": 1}}) == "chat_template_kwargs"
        assert ask(plain | {"chat_template_kwargs": {}}) == ask(plain)
        assert ask(plain | {"add_generation_prompt": False}) == ask(plain), "there is none"
        assert ask(answered | {"add_generation_prompt": False}) == "add_generation_prompt"
    message = chat_pb2.Message(role="user", content="Hi")
    request = chat_pb2.ChatRequest(model=layout, messages=[message], chat_template_kwargs='{"style": 1}')
    with pytest.raises(grpc.RpcError, match="chat_template_kwargs: "):
        doors.grpc.Chat(request, timeout=30)


def _param(answer: httpx.Response) -> str:
    assert answer.status_code == 400
    return str(answer.json()["error"]["param"])


def _details(error: Any) -> str:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(error.details())


def as_transformers_documents(messages: Sequence[Json]) -> list[Json]:
    """For templates: arguments are objects, and a result has the name of its function."""
    chat: list[Json] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call["id"]: call["function"]["name"] for call in calls}
        parsed = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in calls
        ]
        named = {"name": names[call_id]} if (call_id := message.get("tool_call_id")) in names else {}
        chat.append(
            {**message, **named, "content": message["content"] or "", **({"tool_calls": parsed} if parsed else {})}
        )
    return chat


def _proto(message: Json) -> Any:
    """The same message over gRPC."""
    content = message["content"] or message.get("refusal") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or part["refusal"] for part in content)
    return chat_pb2.Message(
        role=message.get("role"),
        content=content,
        tool_calls=[_proto_call(call) for call in message.get("tool_calls") or ()],
        tool_call_id=message.get("tool_call_id"),
        name=message.get("name"),
    )


def _proto_call(call: Json) -> Any:
    function = call["function"]
    arguments = function.get("arguments")
    text = json.dumps(arguments) if isinstance(arguments, dict) else arguments
    return chat_pb2.ToolCall(id=call.get("id"), name=function.get("name"), arguments=text)


def _proto_tool(one: Json) -> Any:
    function = one["function"]
    return chat_pb2.Tool(
        name=function["name"], description=function["description"], parameters=json.dumps(function["parameters"])
    )
