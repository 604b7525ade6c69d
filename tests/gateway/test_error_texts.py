"""What a client reads of an error: our own words, which name the field and what was expected, at both doors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.errors import InvalidRequest
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, model_card, tokens_script
from tests.gateway.grpc.test_grpc import USER
from tests.gateway.text.test_forged_turns import mistral_tokenizer
from tests.gateway.vocabularies import write

PLAIN_USER = {"role": "user", "content": "Hi"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [PLAIN_USER]}
LONG_NUMBER = "1" + "0" * 5000  # Python reads 4,300 digits, and its error says how to raise that
# What libraries say of themselves: paths, classes, hints for those who program with them.
OF_LIBRARIES = re.compile(
    r"Traceback|site-packages|\.(py|rs|cc|cpp)\b|pydantic|orjson|xgrammar|set_int_max|protobuf|object at 0x|<class|\n"
)
TEXTS: list[tuple[str, str]] = [  # JSON within a body, and what is said of it
    ("{", "it is not valid JSON: unexpected end of data: line 1 column 2"),
    ("", "it is not valid JSON: it is empty"),
    ("[]", "it must be a JSON object"),
    ('{"a": NaN}', "it is not valid JSON: unexpected character, expected a JSON value: line 1 column 7"),
    (f'{{"const": {LONG_NUMBER}}}', "it is not valid JSON: number is infinity when parsed as double: line 1 column 11"),
    ('{"a":' * 70 + "1" + "}" * 70, "it is nested deeper than 64 levels"),
]


@pytest.fixture(scope="module")
def frontend(request: pytest.FixtureRequest) -> Frontend:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    return build_frontend(card, ScriptedCoordinator(tokens_script([40])))


@pytest.mark.parametrize(("text", "said"), TEXTS, ids=range(len(TEXTS)))
def test_a_schema_in_a_text_that_is_none_is_told_in_our_words(url: str, stub: Any, text: str, said: str) -> None:
    """`Exceeds the limit (4300 digits) for integer string conversion: … use sys.set_int_max_str_digits()`."""
    expected = f"expected a JSON Schema, an object: {said}"
    for field, param in (("guided_json", "guided_json"), ("structured_outputs", "structured_outputs.json")):
        value = {"json": text} if field == "structured_outputs" else text
        error = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {field: value}).json()["error"]
        assert (error["message"], error["param"]) == (f"{param}: {expected}", param)
    held = chat_pb2.StructuredOutputs(json=text)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Chat(chat_pb2.ChatRequest(messages=USER, structured_outputs=held), timeout=30)
    assert refused.value.details() == f"structured_outputs.json: {expected}"  # type: ignore[attr-defined]
    if text:
        tool = chat_pb2.Tool(name="f", parameters=text)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Chat(chat_pb2.ChatRequest(messages=USER, tools=[tool]), timeout=30)
        assert refused.value.details() == f"tools[0].function.parameters: {expected}"  # type: ignore[attr-defined]


def test_a_number_of_thousands_of_digits_is_told_in_our_words_wherever_it_stands(url: str) -> None:
    call = {"id": "123456789", "function": {"name": "f", "arguments": f'{{"a": {LONG_NUMBER}}}'}}
    turns = [PLAIN_USER, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "123456789", "content": f'{{"a": {LONG_NUMBER}}}'}
    for fields in (
        {"logit_bias": {LONG_NUMBER: 1}},
        {"messages": [*turns, result, PLAIN_USER]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 10**300}}}},
        {"structured_outputs": {"regex": f"a{{{LONG_NUMBER}}}"}},
        {"structured_outputs": {"grammar": f'root ::= "a"{{{LONG_NUMBER}}}'}},
    ):
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT | fields)
        if answer.status_code != 200:
            assert answer.status_code == 400
            assert not OF_LIBRARIES.search(answer.json()["error"]["message"]), answer.text


def test_what_a_template_says_is_told_and_what_python_says_of_it_is_not(tmp_path: Path) -> None:
    """`can only concatenate str (not "int") to str` is of our insides; the template's own words are for clients."""
    for number, (template, said) in enumerate(
        (
            ("{{ raise_exception('Only user and assistant roles!') }}", "Only user and assistant roles!"),
            ("{{ messages[0]['content'] + 1 }}", "TypeError"),
            ("{{ nothing.at_all }}", "UndefinedError"),
        )
    ):
        tokenizer = HuggingFaceTokenizer(write(tmp_path / str(number), "byte level", template))
        with pytest.raises(InvalidRequest) as refused:
            tokenizer.encode_chat([PLAIN_USER])
        assert refused.value.message == f"the model's chat template refuses these messages: {said}"


def test_what_mistrals_format_says_is_told_and_what_pydantic_says_is_not(tmp_path: Path) -> None:
    tokenizer = mistral_tokenizer(tmp_path, "mistral_instruct_tokenizer_240323.model.v3")
    said = "the model's chat format refuses these messages: "
    with pytest.raises(InvalidRequest, match=f"^{said}Conversation must start with a user message or system message$"):
        tokenizer.encode_chat([{"role": "tool", "content": "x", "tool_call_id": "123456789"}])
    with pytest.raises(InvalidRequest, match=f"^{said}ValidationError$"):
        tokenizer.encode_chat([PLAIN_USER], [{"type": "function", "function": {"name": 5}}])
