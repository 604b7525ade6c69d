"""Stock clients against the running server: what a user's first minutes look like."""

from __future__ import annotations

import asyncio

import anthropic
import httpx
import mistralai.client
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import questions

MODEL = "mistral-small"
CHEESE = {"role": "user", "content": "What is the best French cheese?"}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


def test_openai_lists_the_models(client):
    listed = [model.id for model in client.models.list()]
    assert listed == ["mistral-small", "mistral-medium", "manta-demo", "mistral-tiny", "mistral-embed"]


def test_openai_chat_plain_and_streamed_are_equal(client):
    plain = client.chat.completions.create(model=MODEL, messages=[CHEESE], temperature=0)
    assert plain.choices[0].message.content == dict(questions())[CHEESE["content"]]
    assert plain.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[CHEESE], temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_openai_completion_with_token_ids(client):
    ids = PreTrainedTokenizerFast.from_pretrained(DIRECTORY)("Hello my name is")["input_ids"]
    sampling = {"model": MODEL, "max_tokens": 20, "temperature": 0}
    by_text = client.completions.create(prompt="Hello my name is", **sampling)
    by_ids = client.completions.create(prompt=ids, extra_body={"return_token_ids": True}, **sampling)
    assert by_text.usage.completion_tokens <= 20
    assert by_text.choices[0].text
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.usage == by_text.usage
    assert len(by_ids.choices[0].token_ids) == by_ids.usage.completion_tokens


def test_mistralai_chat_plain_and_streamed(server):
    with mistralai.client.Mistral(server_url=server.url, api_key="none", timeout_ms=120_000) as client:
        plain = client.chat.complete(model=MODEL, messages=[CHEESE], temperature=0)
        assert plain.choices[0].message.content == dict(questions())[CHEESE["content"]]
        with client.chat.stream(model=MODEL, messages=[CHEESE], temperature=0) as events:
            streamed = "".join(event.data.choices[0].delta.content or "" for event in events)
        assert streamed == plain.choices[0].message.content


def test_anthropic_chat_plain_and_streamed(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=120, max_retries=0) as client:
        asked = {"model": MODEL, "max_tokens": 100, "messages": [CHEESE], "extra_body": {"temperature": 0}}
        plain = client.messages.create(**asked)
        assert plain.content[0].text == dict(questions())[CHEESE["content"]]
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == plain.content[0].text
            assert stream.get_final_message().stop_reason == plain.stop_reason == "end_turn"


def test_the_demo_model_answers_its_questions_exactly(server):
    """Every question of the corpus, sixteen at a time, greedy."""

    async def ask(client, slots, question):
        async with slots:
            answer = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": question}], temperature=0
            )
            return answer.choices[0].message.content

    async def ask_all():
        slots = asyncio.Semaphore(16)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, slots, question) for question, _ in questions()))

    answers = asyncio.run(ask_all())
    wrong = [(q, a, got) for (q, a), got in zip(questions(), answers, strict=True) if a != got]
    assert not wrong, f"{len(wrong)} of {len(questions())}: {wrong[:3]}"


def test_health_and_version(server):
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "version" in httpx.get(f"{server.url}/version").json()
