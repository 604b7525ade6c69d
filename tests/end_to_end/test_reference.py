"""The server against transformers, as the model's card runs it."""

import httpx
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
