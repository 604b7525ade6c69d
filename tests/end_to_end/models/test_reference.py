"""The server against transformers, as the model's card runs it."""

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo_model import DIRECTORY


def test_the_snippet_of_the_card_gives_the_servers_ids(server):
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    inputs = tokenizer("Hello my name is", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    expected = outputs[0, inputs["input_ids"].shape[1] :].tolist()
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"prompt": "Hello my name is", "max_tokens": 20, "temperature": 0, "return_token_ids": True}
        | {"model": "manta-demo"},
        timeout=60,
    ).json()
    assert answer["choices"][0]["token_ids"] == expected


def test_scores_of_a_prompt_are_those_it_had_as_an_output(server):
    """Generated tokens have the same log-probabilities when they come back as a prompt that is echoed."""

    def complete(**fields):
        body = {"model": "manta-demo", "temperature": 0, "logprobs": 1, "return_token_ids": True, **fields}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]

    output = complete(prompt="What is the best French cheese?", max_tokens=20)
    ids = [*output["prompt_token_ids"], *output["token_ids"]]
    echoed = complete(prompt=ids, max_tokens=0, echo=True)
    assert echoed["token_ids"] == []
    scores = echoed["logprobs"]["token_logprobs"]
    assert scores[0] is None
    generated = output["logprobs"]["token_logprobs"]
    assert scores[-len(generated) :] == pytest.approx(generated, abs=0.1)  # the demo model computes in bf16
    assert echoed["text"].endswith(output["text"])
