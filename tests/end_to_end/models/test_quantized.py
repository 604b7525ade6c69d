"""Quantised models on a real server: some that were stored so, and the demo model rounded while it is read."""

from __future__ import annotations

import json
import random

import httpx
import openai
import pytest
import torch

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import questions
from tests.checkpoints import CausalLM
from tests.conftest import running_server
from tests.processes import processes
from tests.quantized_checkpoints import compressed_tensors, gptq, write_quantized_demo

# As llm-compressor makes FP8_DYNAMIC.
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
QUESTION, ANSWER = next(iter(questions()))


@pytest.fixture(scope="module")
def stored_fp8(tmp_path_factory) -> tuple[str, CausalLM]:
    """Where it is, and the model of what its numbers stand for."""
    directory = tmp_path_factory.mktemp("quantized") / "fp8"
    return str(directory), write_quantized_demo(directory, compressed_tensors("float-quantized", WEIGHTS, ACTIVATIONS))


@pytest.fixture(scope="module")
def server(tmp_path_factory, stored_fp8):
    stored = tmp_path_factory.mktemp("quantized") / "gptq"
    write_quantized_demo(stored, gptq(8, group_size=128))
    experts = {"groups": GROUPS, "transport": "lane"}
    models = [
        {"name": "gptq", "path": str(stored), "experts": experts},
        {"name": "int4", "path": str(DIRECTORY), "experts": experts, "engine": {"quantization": "int4"}},
        {"name": "fp8", "path": stored_fp8[0], "experts": experts},
        {"name": "fp8-in-fp32", "path": stored_fp8[0], "experts": experts, "engine": {"dtype": "float32"}},
    ]
    with running_server(json.dumps({"models": models})) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.mark.long
@pytest.mark.parametrize("model", ["gptq", "int4", "fp8"])
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
    assert len({*prints.values()}) == len(prints) == 4


@pytest.mark.long
def test_tokens_of_an_fp8_checkpoint_are_those_of_what_its_numbers_stand_for(server, stored_fp8):
    """Over lanes between processes, in fp32, where the weights are all that was rounded."""
    prompts = torch.randint(3, 512, (8, 24), generator=torch.Generator().manual_seed(0))
    body = {"model": "fp8-in-fp32", "prompt": prompts.tolist(), "max_tokens": 32, "temperature": 0}
    body |= {"min_tokens": 32, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    with torch.inference_mode():
        expected = stored_fp8[1].generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    assert [choice["token_ids"] for choice in answer.json()["choices"]] == expected[:, 24:].tolist()


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
