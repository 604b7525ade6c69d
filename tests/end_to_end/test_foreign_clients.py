"""Clients that others wrote, unmodified, each with a base URL changed and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from cluster.demo_model.corpus import questions
from tests.environments import make_environment, run_in

MODEL = "manta-demo"
CHEESE = "What is the best French cheese?"
ANSWER = dict(questions())[CHEESE]
SCRIPTS = Path(__file__).parent / "foreign"


def run_script(name, server, directory, *requirements):
    python = make_environment(directory / "environment", *requirements)
    return json.loads(run_in(python, SCRIPTS / name, server.url, MODEL, CHEESE).splitlines()[-1])


def test_huggingface_hub(server):
    client = huggingface_hub.InferenceClient(base_url=server.url, api_key="none", timeout=60)
    messages = [{"role": "user", "content": CHEESE}]
    whole = client.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100)
    assert whole.choices[0].message.content == ANSWER
    chunks = client.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


@pytest.mark.long
def test_mistralai_of_2024(server, tmp_path):
    answers = run_script("mistralai_0_4_2.py", server, tmp_path, "mistralai==0.4.2")
    assert answers["whole"] == answers["streamed"] == ANSWER
    assert answers["finish_reason"] == "stop"
    assert MODEL in answers["models"]


@pytest.mark.long
def test_langchain(server, tmp_path):
    answers = run_script("langchain.py", server, tmp_path, "langchain-openai", "langchain-mistralai")
    for name in ("openai", "mistralai"):
        assert answers[name]["whole"] == answers[name]["streamed"] == ANSWER
        assert answers[name]["tokens"] > 0


@pytest.mark.long
def test_litellm(server, tmp_path):
    answers = run_script("litellm_client.py", server, tmp_path, "litellm")
    for provider in ("openai", "hosted_vllm"):
        assert answers[provider]["whole"] == answers[provider]["streamed"] == ANSWER
        assert answers[provider]["tokens"] > 0
