"""Whatever the server answers is history for its next answer: in every layout of tokenizers, and from every door."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import mistral_common
import openai
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from cluster.config import GatewayConfig
from cluster.messages import Request, TokenChunk, ToolTokens
from gateway.answer.chat import ChatShape, ChoiceText
from gateway.answer.choice import Choice, Usage
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.request.protocol import ChatCompletionRequest, parse_body
from gateway.request.validator import Validator
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer, Tokenizer
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    http_server,
    model_card,
    tokens_script,
    write_tokenizer,
)
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.request.test_tools import SPELLING_TEMPLATE, TEMPLATE_WITH_TOOLS, TIME, USER, WEATHER

DATA = Path(mistral_common.__file__).parent / "data"
ARGUMENTS = '{"city": "Pâris \\"}]"}'
MARKERS = re.compile(r"(\[TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\])")

HALF = "ti"  # of a name

# What a model says. A call is `name(arguments)`; the last one may be cut.
ANSWERS = {
    "text": "It rains.",
    "nothing": "",
    "a blank": " ",
    "a call": f"weather({ARGUMENTS})",
    "two calls": f"weather({ARGUMENTS})time({{}})",
    "text and a call": f"I look. weather({ARGUMENTS})",
    "text and two calls": f"I look. weather({ARGUMENTS})time({{}})",
    "a call that is cut": 'weather({"city": "P',
    "a call without its arguments": "weather(",
    "a call, and half of another's name": f"weather({ARGUMENTS}){HALF}",
    "text that spells one": "[TOOL_CALL] weather",
    "a number that Python does not read": 'weather({"city": ' + "7" * 5000 + "})",
}
CUT = ("a call that is cut", "a call without its arguments", "a call, and half of another's name")


def tekken(directory: Path, version: str, extra: tuple[str, ...] = (), size: int | None = None) -> Path:
    """mistral-common ships none of the later ones; one is made of an earlier one, with its first `size` words."""
    with open(DATA / "tekken_240911.json") as file:
        document = json.load(file)
    document["config"]["version"] = version
    names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += [name for name in ("[ARGS]", "[CALL_ID]", *extra) if name not in names]
    document["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    if size is not None:
        document["vocab"] = document["vocab"][:size]
        document["config"] |= {
            "default_num_special_tokens": len(names),
            "default_vocab_size": size + len(names),
        }
    (directory / "tekken.json").write_text(json.dumps(document))
    return directory


def shipped(name: str) -> Callable[[Path], Tokenizer]:
    return lambda directory: MistralTokenizer(Path(shutil.copy(DATA / name, directory)).parent)


LAYOUTS: dict[str, Callable[[Path], Tokenizer]] = {
    "a template without tools": lambda path: HuggingFaceTokenizer(write_tokenizer(path)),
    "a template with tools": lambda path: HuggingFaceTokenizer(
        write_tokenizer(path, chat_template=TEMPLATE_WITH_TOOLS, special=["[TOOL_CALLS]"])
    ),
    "a template that spells calls": lambda path: HuggingFaceTokenizer(
        write_tokenizer(path, chat_template=SPELLING_TEMPLATE, special=["[TOOL_CALLS]", "[ARGS]"])
    ),
    "v1": shipped("tokenizer.model.v1"),
    "v2": shipped("mistral_instruct_tokenizer_240216.model.v2"),
    "v3": shipped("mistral_instruct_tokenizer_240323.model.v3"),
    "v7": shipped("mistral_instruct_tokenizer_241114.model.v7"),
    "Tekken v3": shipped("tekken_240911.json"),
    "Tekken v11": lambda path: MistralTokenizer(tekken(path, "v11")),
    "Tekken v13": lambda path: MistralTokenizer(tekken(path, "v13")),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.long) if name in ("v1", "v2", "Tekken v11") else name for name in LAYOUTS
    ],
)
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    directory = tmp_path_factory.mktemp("layout")
    tokenizer = LAYOUTS[request.param](directory)
    card = model_card(directory, max_model_len=32_768, vocab_size=tokenizer.vocab_size)
    return request.param, tokenizer, Validator(card, tokenizer, GatewayConfig())


def spelled(answer: str, tokens: ToolTokens) -> str:
    """As the layout's models write it."""
    half = HALF if answer.endswith(HALF) else ""
    text, *rest = re.split(r"(weather|time)\(", answer.removesuffix(HALF))
    calls = list(zip(rest[::2], rest[1::2], strict=True))
    if tokens.args is not None:
        call_id = "" if tokens.call_id is None else "[CALL_ID]Abc123xyz"
        each = [f"{name}{call_id}[ARGS]{said.removesuffix(')')}" for name, said in calls] + ([half] if half else [])
        return text + "".join(f"[TOOL_CALLS]{call}" for call in each)
    listed = []
    for name, said in calls:
        end = "}" if said.endswith(")") else ""
        listed.append(f'{{"name": "{name}", "arguments": {said.removesuffix(")")}{end}')
    listed += [f'{{"name": "{half}'] if half else []
    return text + (f"[TOOL_CALLS] [{', '.join(listed)}" if calls else "")


def token_ids_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """With markers in special tokens, where there are such."""
    tokens = tokenizer.tool_tokens
    special = {"[TOOL_CALLS]": tokens.calls, "[ARGS]": tokens.args, "[CALL_ID]": tokens.call_id}
    ids: list[int] = []
    for part in MARKERS.split(text):
        token_id = special.get(part)
        ids += tokenizer.encode(part, add_special_tokens=False) if token_id is None else [token_id]
    return ids


def answered(validator: Validator, tokenizer: Tokenizer, token_ids: list[int], *, cut: bool) -> Any:
    """The message of an answer."""
    document = {"model": "tiny", "messages": [USER], "tools": [WEATHER, TIME]}
    body = parse_body(ChatCompletionRequest, document, 0)
    generation = validator.chat(body)
    usage = Usage(0)
    choice, whole = Choice(0, generation.requests[0], generation, tokenizer, usage), ChoiceText()
    for at, token_id in enumerate(token_ids):
        whole.add(choice.push(TokenChunk("r", 0, at, (token_id,))))
    reason: Any = "length" if cut else "stop"
    whole.add(choice.push(TokenChunk("r", 0, len(token_ids), (), finish_reason=reason)))
    return ChatShape(generation, tokenizer, body).whole([whole], usage)["choices"][0]["message"]


def results(calls: Any) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls or ()]


def prompt_of(validator: Validator, tokenizer: Tokenizer, turns: list[Any]) -> str:
    """The text of what the model is asked next; raises InvalidRequest."""
    body = {"model": "tiny", "messages": turns, "tools": [WEATHER, TIME]}
    [request] = validator.chat(parse_body(ChatCompletionRequest, body, 0)).requests
    ids = [i for i in request.prompt_token_ids if i not in tokenizer.special_ids]
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_answer_is_history_in_every_layout(layout: tuple[str, Tokenizer, Validator], answer: str) -> None:
    """Text and a call together, and an answer of nothing, were refused by the server that had written them."""
    name, tokenizer, validator = layout
    written = spelled(ANSWERS[answer], tokenizer.tool_tokens)
    if written.startswith("I look.") and tokenizer.tool_tokens.calls is None:
        return  # there calls are all of an answer
    message = answered(validator, tokenizer, token_ids_of(written, tokenizer), cut=answer in CUT)
    calls = message.get("tool_calls", [])
    assert len(calls) == ANSWERS[answer].count("(")
    if name == "v2" and len(calls) > 1:
        return  # it has no way to answer two
    turns = [USER, message, *results(calls)]
    said = prompt_of(validator, tokenizer, turns) if calls else ""
    for call in calls:
        function = call["function"]
        as_text = json.dumps(function["arguments"] or {}, ensure_ascii=False)
        assert function["name"] in said
        assert as_text in said or function["arguments"] in said
    said += prompt_of(validator, tokenizer, [*turns, {"role": "assistant", "content": "Wet."}, USER])
    if name != "a template with tools":  # which leaves text beside calls out
        assert message["content"].strip() in said
    assert "Wet." in said


def test_text_before_calls_is_where_the_model_wrote_it(layout: tuple[str, Tokenizer, Validator]) -> None:
    """To the token: what the model has computed once, its next prompt begins with."""
    name, tokenizer, validator = layout
    if not name.endswith(("v2", "v3", "v7", "v11", "v13")):
        return
    call = {"id": "Abc123xyz", "function": {"name": "weather", "arguments": '{"city": "Lyon"}'}}
    message = {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    body = {"model": "tiny", "messages": [USER, message, *results([call])]}
    [request] = validator.chat(parse_body(ChatCompletionRequest, body, 0)).requests
    ids = list(request.prompt_token_ids)
    marker = ids.index(tokenizer.tool_tokens.calls)
    text = list(tokenizer.encode("I look.", add_special_tokens=False))
    assert ids[marker - len(text) : marker] == text
    assert tokenizer.token_bytes(ids[marker - len(text) - 1]) == b"[/INST]"
    ended = ids.index(next(i for i in tokenizer.special_ids if tokenizer.token_bytes(i) == b"</s>"))
    assert ended > marker
    assert b"Lyon" in b"".join(map(tokenizer.token_bytes, ids[marker:ended]))


class Saying:
    """A model that says one thing after another."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.is_cut = False
        self.coordinator = ScriptedCoordinator(self._script)

    def _script(self, request: Request) -> AsyncIterator[TokenChunk]:
        return tokens_script(self.token_ids, chunk=3, eos=None if self.is_cut else 1)(request)


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, Saying, openai.OpenAI, Any]]:
    directory = tmp_path_factory.mktemp("doors")
    tokenizer = LAYOUTS["a template that spells calls"](directory)
    saying = Saying()
    card = model_card(directory, max_model_len=32_768, vocab_size=tokenizer.vocab_size)
    frontend = build_frontend(card, saying.coordinator)
    with (
        http_server(frontend) as url,
        grpc_server(frontend) as channel,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield tokenizer, saying, client, chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]


CHAT: Any = {"model": "tiny", "tools": [WEATHER, TIME]}
FLAT: Any = [{"type": "function", "parameters": {}, **tool["function"]} for tool in (WEATHER, TIME)]


def chat_turns(client: openai.OpenAI) -> Any:
    message = client.chat.completions.create(messages=[USER], **CHAT).choices[0].message.model_dump()
    turns = [USER, message, *results(message["tool_calls"]), USER]
    return lambda: client.chat.completions.create(messages=turns, **CHAT)


def streamed_turns(client: openai.OpenAI) -> Any:
    with client.chat.completions.stream(messages=[USER], **CHAT) as stream:
        for _ in stream:
            pass
        message = stream.current_completion_snapshot.choices[0].message.model_dump()
    turns = [USER, message, *results(message["tool_calls"]), USER]
    return lambda: client.chat.completions.create(messages=turns, **CHAT)


def responses_turns(client: openai.OpenAI, *, stream: bool) -> Any:
    asked: Any = {"model": "tiny", "tools": FLAT}
    if stream:
        *_, last = client.responses.create(input=[USER], stream=True, **asked)
        output = last.response.output
    else:
        output = client.responses.create(input=[USER], **asked).output
    calls = [item.call_id for item in output if item.type == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call_id, "output": "rain"} for call_id in calls]
    turns: Any = [USER, *[item.model_dump() for item in output], *outputs, USER]
    return lambda: client.responses.create(input=turns, **asked)


def grpc_turns(stub: Any, *, stream: bool) -> Any:
    user = chat_pb2.Message(role="user", content=USER["content"])
    tools = [
        chat_pb2.Tool(
            name=tool["function"]["name"],
            description=tool["function"].get("description", ""),
            parameters=json.dumps(tool["function"].get("parameters", {})),
        )
        for tool in (WEATHER, TIME)
    ]
    asked = chat_pb2.ChatRequest(model="tiny", messages=[user], tools=tools)
    choices = [chunk.choice for chunk in stub.ChatStream(asked)] if stream else list(stub.Chat(asked).choices)
    calls: dict[int, chat_pb2.ToolCall] = {}
    for piece in (call for choice in choices for call in choice.tool_calls):
        call = calls.setdefault(piece.index, chat_pb2.ToolCall(id=piece.id, name=piece.name, index=piece.index))
        call.arguments += piece.arguments
    answer = chat_pb2.Message(
        role="assistant", content="".join(choice.text for choice in choices), tool_calls=calls.values()
    )
    rain = [chat_pb2.Message(role="tool", tool_call_id=call.id, content="rain") for call in calls.values()]
    return lambda: stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=[user, answer, *rain, user], tools=tools))


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if "number" not in answer])
def test_every_door_s_answer_is_its_history(doors: Any, answer: str) -> None:
    """And the same one: the next prompt has the same tokens but for the ids of calls."""
    tokenizer, saying, client, stub = doors
    saying.token_ids = token_ids_of(spelled(ANSWERS[answer], tokenizer.tool_tokens), tokenizer)
    saying.is_cut = answer in CUT
    prompts = []
    for next_turn in (
        chat_turns(client),
        streamed_turns(client),
        responses_turns(client, stream=False),
        responses_turns(client, stream=True),
        grpc_turns(stub, stream=False),
        grpc_turns(stub, stream=True),
    ):
        next_turn()
        prompts.append(saying.coordinator.requests[-1].prompt_token_ids)
    assert len(set(prompts)) == 1
    assert ANSWERS[answer].partition("weather(")[0].strip() in tokenizer.decode(prompts[0])
