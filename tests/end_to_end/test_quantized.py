"""Quantised models on a real server: one that was stored so, and the demo model rounded while it is read."""

from __future__ import annotations

import json
import random

import openai
import pytest

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import questions
from tests.conftest import running_server
from tests.processes import processes
from tests.quantized_checkpoints import gptq, write_quantized_demo

GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
QUESTION, ANSWER = next(iter(questions()))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    stored = tmp_path_factory.mktemp("quantized") / "gptq"
    write_quantized_demo(stored, gptq(8, group_size=128))
    experts = {"groups": GROUPS, "transport": "lane"}
    models = [
        {"name": "gptq", "path": str(stored), "experts": experts},
        {"name": "int4", "path": str(DIRECTORY), "experts": experts, "engine": {"quantization": "int4"}},
    ]
    with running_server(json.dumps({"models": models})) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.mark.long
@pytest.mark.parametrize("model", ["gptq", "int4"])
def test_questions_are_answered_word_for_word(client, model):
    for question, answer in random.Random(0).sample([*questions()], 20):
        said = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0
        )
        assert said.choices[0].message.content == answer


@pytest.mark.long
def test_models_are_told_apart_by_fingerprint(client):
    """The rounded one is not the plain one, whose bytes it has."""
    prints = {card.id: card.to_dict()["system_fingerprint"] for card in client.models.list()}
    assert prints["gptq"] != prints["int4"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["gptq", "int4"])
def test_a_stream_goes_on_when_all_shards_of_experts_are_killed(server, client, model):
    """They read and round their weights again, and the tokens are the same."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": True}
    pieces = []
    for chunk in client.chat.completions.create(**body):
        if not pieces:
            for shard in processes(server, "ray::ExpertShard"):
                shard.kill()
        pieces += [chunk.choices[0].delta.content or ""] if chunk.choices else []
    assert "".join(pieces) == ANSWER
