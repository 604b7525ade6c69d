"""The tokenizer of these tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.messages import ModelCard
from gateway.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import model_card, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_directory)


@pytest.fixture
def card(tokenizer_directory: Path) -> ModelCard:
    return model_card(tokenizer_directory)
