"""What tests of engines share: a thread, as tiny matrices are fastest on one and test processes many, and a model."""

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.gateway.doubles import write_tokenizer

VOCABULARY = 336  # of a tokenizer of 320, padded, as some models' are


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _patient_compilers():
    """Whose trial process gives way to all others: on a busy machine it imports xgrammar for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compiler._START_S", "trial._START_TIMEOUT_S"):
            patch.setattr(f"router_service.grammar.{name}", 600.0)
        yield


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A random tiny Mixtral with a byte-level tokenizer. Nobody changes it."""
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)
    write_tokenizer(directory)
    return directory


@pytest.fixture
def no_grammar_is_late(monkeypatch):
    """On a busy machine the thread that follows it is, and its sequence in no step until then."""
    monkeypatch.setattr("router_service.sampling.sampler._GRACE_S", 30.0)
