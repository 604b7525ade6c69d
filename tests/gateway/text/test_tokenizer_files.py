"""What is wrong with a tokenizer is said by its file, and before weights are loaded; a token that the model has no
embedding for ends the request that uses it, and nobody else's.

A pad token was added to a tokenizer, and the embeddings were never resized. Its text in a prompt became an id past the
last row, which ended the engine; the request went on to the next coordinator, and four were gone in 20 s.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import mistral_common
import pytest

from cluster.errors import CheckpointError
from cluster.messages import ToolTokens
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from gateway.text.tokenizer_files import load_tokenizer
from tests.gateway.doubles import (
    CHAT_TEMPLATE,
    ScriptedCoordinator,
    build_frontend,
    http_server,
    model_card,
    tokens_script,
    write_tokenizer,
)
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.test_embeddings import EmbeddingCoordinator

ROWS = 313  # the tokenizer's own tokens
PAD = ROWS  # the id of what was added
MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose pad token is named in tokenizer_config.json alone: transformers adds it when it is loaded."""
    directory = write_tokenizer(tmp_path_factory.mktemp("padded"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    return directory


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40]))


@pytest.fixture(scope="module")
def url(padded: Path, coordinator: ScriptedCoordinator) -> Iterator[str]:
    with http_server(build_frontend(model_card(padded, vocab_size=ROWS), coordinator)) as url:
        yield url


def refusal(directory: Path, layout: Any = "huggingface", num_embeddings: int = 320) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(directory, layout, num_embeddings)
    return caught.value.message


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "Hello [PAD]"}, "prompt"),
        ("/v1/completions", {"prompt": ["Hello", "[PAD]"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [5, PAD]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [[5], [5, PAD]]}, "prompt[1][1]"),
        ("/v1/completions", {"prompt": "Hello", "stop_token_ids": [PAD]}, "stop_token_ids[0]"),
        ("/v1/completions", {"prompt": "Hello", "logit_bias": {str(PAD): 1}}, f"logit_bias.{PAD}"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop_token_ids": [PAD]}, None),
        ("/tokenize", {"prompt": "Hello [PAD]"}, "prompt"),
        ("/detokenize", {"tokens": [PAD]}, "tokens[0]"),
    ],
)
def test_an_id_past_the_embeddings_is_refused_wherever_it_comes_from(
    url: str, coordinator: ScriptedCoordinator, route: str, fields: dict[str, Any], param: str | None
) -> None:
    asked = len(coordinator.requests)
    answer = httpx.post(url + route, json={"model": "tiny", "max_tokens": 1, **fields}, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == (param or "stop_token_ids[0]")
    assert str(PAD) in error["message"]
    assert len(coordinator.requests) == asked


def test_over_grpc_as_well(padded: Path, coordinator: ScriptedCoordinator) -> None:
    asked = len(coordinator.requests)
    with grpc_server(build_frontend(model_card(padded, vocab_size=ROWS), coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        ids = chat_pb2.TokenIds(ids=[PAD])
        for call, request in (
            (stub.Generate, chat_pb2.GenerateRequest(model="tiny", text="[PAD]")),
            (stub.Generate, chat_pb2.GenerateRequest(model="tiny", token_ids=ids)),
            (stub.Tokenize, chat_pb2.TokenizeRequest(model="tiny", text="[PAD]")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert str(PAD) in caught.value.details()
    assert len(coordinator.requests) == asked


def test_in_an_embeddings_input_as_well(padded: Path) -> None:
    embedding = EmbeddingCoordinator()
    card = model_card(padded, vocab_size=ROWS, kind="embedding", hidden_size=8)
    with http_server(build_frontend(card, embedding)) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": ["a", "[PAD]"]}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")
    assert embedding.requests == []


def test_in_a_chat_it_is_the_text_that_it_is(url: str, coordinator: ScriptedCoordinator) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What does [PAD] mean?"}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 200
    assert max(coordinator.requests[-1].prompt_token_ids) < ROWS


def test_a_token_without_an_embedding_is_told_once(padded: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_tokenizer(padded, "huggingface", ROWS)
    [told] = [record.getMessage() for record in caplog.records if record.name == "gateway.text.tokenizer_files"]
    assert str(padded / "tokenizer.json") in told
    assert f"'[PAD]' ({PAD})" in told
    assert f"{ROWS} embeddings" in told
    caplog.clear()
    load_tokenizer(padded, "huggingface", ROWS + 1)
    assert not caplog.records


def test_a_tokenizer_of_another_model_is_refused(padded: Path, tmp_path: Path) -> None:
    """Ordinary text would get ids that the model does not have."""
    message = refusal(padded, num_embeddings=300)
    assert message.startswith(str(padded / "tokenizer.json"))
    assert "has 13 tokens with ids from 300 on" in message
    (tmp_path / "tokenizer.model.v3").symlink_to(MISTRAL_DATA / "mistral_instruct_tokenizer_240323.model.v3")
    message = refusal(tmp_path, "mistral", 32000)
    assert message.startswith(str(tmp_path / "tokenizer.model.v3"))
    assert "has 768 tokens with ids from 32000 on" in message
    load_tokenizer(tmp_path, "mistral", 32768)


def test_a_template_that_nobody_could_chat_by_is_refused(tmp_path: Path) -> None:
    """ChatML's tokens were added to the tokenizer and not to the model: every chat would have been refused."""
    write_tokenizer(tmp_path, special=["<|im_start|>"], chat_template="<|im_start|>{{ messages[0].content }}")
    message = refusal(tmp_path, num_embeddings=ROWS)
    assert "every chat by the template in" in message
    assert str(tmp_path / "chat_template.jinja") in message
    assert "'<|im_start|>'" in message


def test_a_token_around_every_prompt_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, special=["[BOS]"])
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[BOS]": {"id": "[BOS]", "ids": [PAD], "tokens": ["[BOS]"]}},
    }
    file.write_text(json.dumps(document))
    assert "every prompt holds '[BOS]'" in refusal(tmp_path, num_embeddings=ROWS)


def test_calls_are_not_spelled_with_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, special=["[TOOL_CALLS]"])
    assert load_tokenizer(tmp_path, "huggingface", ROWS + 1).tool_tokens.calls == PAD
    assert load_tokenizer(tmp_path, "huggingface", ROWS).tool_tokens == ToolTokens()


# Files that are missing or broken


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nonesuch"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}'),
        ("special_tokens_map.json", "{"),
        ("added_tokens.json", "{"),
        ("chat_template.jinja", "{% for %}"),
        ("chat_template.jinja", "{{ messages | nonesuch }}"),
        ("chat_template.jinja", CHAT_TEMPLATE + "{% if %}"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path))
    assert name in message


def test_a_template_inside_the_configuration_is_named_by_its_line(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    file = tmp_path / "tokenizer_config.json"
    for template in ("{{ bos_token }}\n{% if x %}", [{"name": "default", "template": "\n{{ x"}]):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
        message = refusal(tmp_path)
        assert message.startswith(f"{file}: the chat template does not compile: line 2: ")


def test_a_template_that_refuses_a_plain_chat_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It compiles, so completions may be served; but its author should see why no chat is."""
    write_tokenizer(tmp_path, chat_template="{{ strftime_of(messages) }}")
    load_tokenizer(tmp_path, "huggingface", 320)
    assert "'strftime_of' is undefined" in caplog.text
    assert str(tmp_path) in caplog.text


@pytest.mark.parametrize(
    ("layout", "named"), [("huggingface", "tokenizer.json"), ("mistral", "tekken.json nor tokenizer.model")]
)
def test_a_missing_tokenizer_is_named(tmp_path: Path, layout: Any, named: str) -> None:
    message = refusal(tmp_path, layout)
    assert str(tmp_path) in message
    assert named in message


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "tokenizer.model.v3"])
def test_a_broken_tokenizer_of_mistrals_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{")
    assert refusal(tmp_path, "mistral").startswith(f"{tmp_path / name} cannot be read as a tokenizer: ")


def test_a_whole_tokenizer_is_what_it_was(tokenizer_directory: Path, tokenizer: HuggingFaceTokenizer) -> None:
    loaded = load_tokenizer(tokenizer_directory, "huggingface", 320)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert loaded.encode("Hello") == tokenizer.encode("Hello")
    assert loaded.tool_tokens == tokenizer.tool_tokens
