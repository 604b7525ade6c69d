"""Families with experts behind a real server, all at once: their experts in processes, and while all of those die."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
NUM_PROCESSES = {"qwen3_moe": 2, "olmoe": 4, "qwen2_moe": 2, "granitemoe": 4}  # of each family's experts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Random ones in fp32, where they are and as transformers has them."""
    made = {}
    for family in NUM_PROCESSES:
        directory = tmp_path_factory.mktemp(family)
        model = random_model(family, vocab_size=VOCABULARY)
        write_model(directory, model)
        for name in TOKENIZER:
            shutil.copy(DIRECTORY / name, directory)
        made[family] = directory, model
    return made


@pytest.fixture(scope="module")
def server(models: dict[str, tuple[Path, Any]]) -> Iterator[Server]:
    """With all of them."""
    served = [
        {
            "name": family,
            "path": str(models[family][0]),
            "engine": {"max_model_len": 256, "kv_cache_gib": 0.05},
            "experts": {"groups": [[*range(i, 8, number)] for i in range(number)], "transport": "lane"}
            | {"expert_timeout_s": 300.0},  # twelve processes start again, on two cores
        }
        for family, number in NUM_PROCESSES.items()
    ]
    with running_server(json.dumps({"models": served})) as running:
        yield running


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


def answers(server: Server, when_begun: Callable[[], Any] = lambda: None) -> dict[str, str]:
    """Of all models side by side; each stream calls `when_begun` after its first text."""

    def answer(family: str) -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=400, max_retries=0) as client:
            pieces: list[str] = []
            for chunk in client.completions.create(
                model=family,
                prompt=PROMPT,
                max_tokens=NUM_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                if not pieces:
                    when_begun()
                pieces += [choice.text for choice in chunk.choices]
            return "".join(pieces)

    with ThreadPoolExecutor(len(NUM_PROCESSES)) as threads:
        return dict(zip(NUM_PROCESSES, threads.map(answer, NUM_PROCESSES), strict=True))


def test_64_greedy_tokens_are_those_of_transformers(server: Server, models: dict[str, tuple[Path, Any]]) -> None:
    assert answers(server) == {family: reference_text(model) for family, (_, model) in models.items()}


def test_they_are_while_every_shard_is_killed(server: Server, models: dict[str, tuple[Path, Any]]) -> None:
    def kill() -> None:
        shards = processes(server, "ray::ExpertShard")
        assert len(shards) == sum(NUM_PROCESSES.values())
        for shard in shards:
            shard.kill()

    first = iter([kill])
    given = answers(server, lambda: next(first, lambda: None)())
    assert next(first, None) is None
    assert given == {family: reference_text(model) for family, (_, model) in models.items()}
