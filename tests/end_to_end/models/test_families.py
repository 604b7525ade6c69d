"""Families with experts behind a real server: in 2 and in 4 processes, and while shards are killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cluster.demo_model import DIRECTORY
from tests.conftest import Server, running_server
from tests.families import random_model, write_model
from tests.processes import processes

pytestmark = pytest.mark.long

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCABULARY = 2048  # that of the tokenizer
PROMPT = [*range(40, 80)]
NUM_TOKENS = 64
NUM_PROCESSES = (2, 4)


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe", "qwen2_moe", "granitemoe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Any]]:
    """A server with one random model in fp32, its 8 experts in 2 processes and once more in 4, and the reference."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    model = random_model(request.param, vocab_size=VOCABULARY)
    write_model(directory, model)
    for name in TOKENIZER:
        shutil.copy(DIRECTORY / name, directory)
    models = [
        {
            "name": f"in-{number}",
            "path": str(directory),
            "engine": {"max_model_len": 256, "kv_cache_gib": 0.05},
            "experts": {"groups": [[*range(i, 8, number)] for i in range(number)], "transport": "lane"}
            | {"expert_timeout_s": 150.0},  # six processes start again, on two cores
        }
        for number in NUM_PROCESSES
    ]
    with running_server(json.dumps({"models": models})) as server:
        yield server, model


@pytest.fixture
def client(family: tuple[Server, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{family[0].url}/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def reference_text(model: PreTrainedModel) -> str:
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DIRECTORY / "tokenizer.json"))
    return str(tokenizer.decode(output[0, len(PROMPT) :], skip_special_tokens=True))


@pytest.mark.parametrize("kills", [False, True], ids=["undisturbed", "shards-killed"])
@pytest.mark.parametrize("number", NUM_PROCESSES)
def test_64_greedy_tokens_are_those_of_transformers(
    family: tuple[Server, Any], client: openai.OpenAI, number: int, kills: bool
) -> None:
    server, model = family
    stream = client.completions.create(
        model=f"in-{number}",
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces: list[str] = []
    for chunk in stream:
        if kills and not pieces:
            shards = processes(server, "ray::ExpertShard")
            assert len(shards) == sum(NUM_PROCESSES)
            for shard in shards:
                shard.kill()
        pieces += [choice.text for choice in chunk.choices]
    assert "".join(pieces) == reference_text(model)
