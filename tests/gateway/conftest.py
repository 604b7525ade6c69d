"""The tokenizer of these tests, made once, and a door whose model says what a module's ANSWER is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.messages import ModelCard
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    http_server,
    model_card,
    tokens_script,
    write_tokenizer,
)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_directory)


@pytest.fixture
def card(tokenizer_directory: Path) -> ModelCard:
    return model_card(tokenizer_directory)


@pytest.fixture(scope="module")
def door(
    request: pytest.FixtureRequest, tokenizer: HuggingFaceTokenizer, tokenizer_directory: Path
) -> Iterator[tuple[str, ScriptedCoordinator]]:
    """(URL, coordinator) of an HTTP door that answers ANSWER."""
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(request.module.ANSWER)[1:]))
    with http_server(build_frontend(model_card(tokenizer_directory), coordinator)) as url:
        yield url, coordinator


@pytest.fixture
def client(door: tuple[str, ScriptedCoordinator]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=door[0] + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def url(frontend: Frontend) -> Iterator[str]:
    """Of the HTTP door of a module's `frontend`."""
    with http_server(frontend) as url:
        yield url


@pytest.fixture(scope="module")
def stub(frontend: Frontend) -> Iterator[Any]:
    """Of its gRPC door."""
    from tests.gateway.grpc.test_grpc import grpc_server

    with grpc_server(frontend) as channel:
        yield chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
