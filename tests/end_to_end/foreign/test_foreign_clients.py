"""Clients that others wrote, unmodified, each with a base URL changed and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest

from cluster.demo_model.training.corpus import questions
from tests.environments import make_environment, run_in

MODEL, EMBED = "manta-demo", "mistral-embed"
CHEESE = "What is the best French cheese?"
ANSWER = dict(questions())[CHEESE]
SCRIPTS = Path(__file__).parent
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Lyon"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}


def run_script(name, server, directory, *requirements):
    python = make_environment(directory / "environment", *requirements)
    arguments = (server.url, MODEL, CHEESE, EMBED, json.dumps(TOOL))
    return json.loads(run_in(python, SCRIPTS / name, *arguments).splitlines()[-1])


def check(answers, server):
    """Chat, streaming, tools both ways, and an embedding."""
    assert answers["whole"] == answers["streamed"] == ANSWER
    assert answers["tokens"] > 0
    assert answers["calls"], "the demo model, which knows no tools, calls it more than once"
    for name, arguments in answers["calls"]:
        assert name == "weather"
        assert arguments["city"] in ("Paris", "Lyon")
    assert answers["streamed_calls"] == answers["calls"]
    plain = httpx.post(f"{server.url}/v1/embeddings", json={"model": EMBED, "input": CHEESE}, timeout=60).json()
    assert answers["embedding"] == pytest.approx(plain["data"][0]["embedding"], abs=1e-2)


def test_huggingface_hub(server):
    """It has no call for embeddings of this kind."""
    client = huggingface_hub.InferenceClient(base_url=server.url, api_key="none", timeout=60)
    messages = [{"role": "user", "content": CHEESE}]
    whole = client.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100)
    assert whole.choices[0].message.content == ANSWER
    chunks = client.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    called = client.chat_completion(messages, model=MODEL, temperature=0, tools=[TOOL], tool_choice="required")
    for call in called.choices[0].message.tool_calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Lyon")


@pytest.mark.long
def test_mistralai_of_2024(server, tmp_path):
    answers = run_script("mistralai_0_4_2.py", server, tmp_path, "mistralai==0.4.2")
    check(answers, server)
    assert answers["finish_reason"] == "stop"
    assert MODEL in answers["models"]


@pytest.mark.long
def test_langchain(server, tmp_path):
    answers = run_script("langchain.py", server, tmp_path, "langchain-openai", "langchain-mistralai")
    for name in ("openai", "mistralai"):
        check(answers[name], server)


@pytest.mark.long
def test_litellm(server, tmp_path):
    answers = run_script("litellm_client.py", server, tmp_path, "litellm", "mcp")  # its tools import that
    for provider in ("openai", "hosted_vllm"):
        check(answers[provider], server)
    assert set(answers["turns"]) == {"openai", "anthropic"}
    for cities in answers["turns"].values():
        assert len(cities) == 20
        assert set(cities) <= {"Paris", "Lyon"}
