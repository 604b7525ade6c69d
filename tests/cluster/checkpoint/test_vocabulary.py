"""What each token stands for, read in the coordinator's way, is what the gateway's tokenizers say."""

import shutil
from pathlib import Path

import mistral_common
import pytest

from cluster.checkpoint.vocabulary import read_vocabulary
from cluster.demo_model import DIRECTORY
from cluster.errors import CheckpointError
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer

MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"


def check(vocabulary, tokenizer):
    assert len(vocabulary.token_bytes) == tokenizer.vocab_size
    assert vocabulary.special_ids == tokenizer.special_ids
    for token_id, data in enumerate(vocabulary.token_bytes):
        assert data == (b"" if token_id in vocabulary.special_ids else tokenizer.token_bytes(token_id)), token_id


def test_hugging_face_s_layout():
    check(read_vocabulary(Path(DIRECTORY), "huggingface"), HuggingFaceTokenizer(Path(DIRECTORY)))


@pytest.mark.parametrize(
    "file", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240718.json"]
)
def test_mistral_s_layout(tmp_path, file):
    shutil.copy(MISTRAL_DATA / file, tmp_path)
    check(read_vocabulary(tmp_path, "mistral"), MistralTokenizer(tmp_path))


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_a_directory_without_a_tokenizer_is_named(tmp_path, layout):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_vocabulary(tmp_path, layout)
