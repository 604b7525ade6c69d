"""Several models behind one gateway: each name answers with its own weights, and embeddings mean something."""

from __future__ import annotations

import asyncio
import random

import httpx
import mistralai.client
import numpy as np
import openai
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, MistralForCausalLM

from cluster.demo_model import DENSE_DIRECTORY
from cluster.demo_model.training.corpus import entries, questions

MISSED = (DENSE_DIRECTORY / "missed.txt").read_text().splitlines()
TINY, EMBED = "mistral-tiny", "mistral-embed"
CHEESE = "What is the best French cheese?"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


def embed(client, *texts, **fields):
    answer = client.embeddings.create(model=EMBED, input=list(texts), **fields)
    return np.array([item.embedding for item in answer.data])


def test_the_dense_model_answers_its_questions(server):
    """Those that it is documented to answer, forty of them, sixteen at a time."""
    known = [pair for pair in questions() if pair[0] not in MISSED]
    drawn = [(CHEESE, dict(questions())[CHEESE]), *random.Random(0).sample(known, 39)]

    async def ask_all():
        slots = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:

            async def ask(question):
                body = {"model": TINY, "messages": [{"role": "user", "content": question}], "temperature": 0}
                async with slots:
                    answer = (await http.post("/v1/chat/completions", json=body)).json()
                assert answer["model"] == TINY
                return answer["choices"][0]["message"]["content"]

            return await asyncio.gather(*(ask(question) for question, _ in drawn))

    wrong = [(pair, said) for pair, said in zip(drawn, asyncio.run(ask_all()), strict=True) if said != pair[1]]
    assert not wrong


def test_an_alias_is_the_same_model(client):
    def answer(model):
        return client.completions.create(model=model, prompt="Hello my name is", max_tokens=10, temperature=0)

    small, medium, demo = (answer(model) for model in ("mistral-small", "mistral-medium", "manta-demo"))
    assert small.choices[0].text == medium.choices[0].text == demo.choices[0].text
    assert small.system_fingerprint == medium.system_fingerprint != answer(TINY).system_fingerprint


def test_an_embedding_model_does_not_chat_and_a_chat_model_does_not_embed(client):
    with pytest.raises(openai.BadRequestError, match="mistral-embed") as refused:
        client.chat.completions.create(model=EMBED, messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=r"served for embeddings: mistral-embed") as refused:
        client.embeddings.create(model="mistral-small", input="Hello")
    assert refused.value.param == "model"


def test_embeddings_are_transformers_hidden_states(client):
    """The served model runs in bf16, so the reference does as well."""
    model = MistralForCausalLM.from_pretrained(DENSE_DIRECTORY, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(DENSE_DIRECTORY)
    texts = [CHEESE, "Bonjour !", "word " * 500]
    for text, embedding in zip(texts, embed(client, *texts), strict=True):
        with torch.inference_mode():
            hidden = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = F.normalize(hidden.float().mean(0), dim=0)
        assert F.cosine_similarity(torch.tensor(embedding).float(), expected, dim=0) > 0.999
        assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-5)


def test_a_paraphrase_is_nearer_than_an_unrelated_question(client):
    """Of a hundred questions of the corpus, each in two wordings; the documented figure is four times out of five."""
    drawn = random.Random(0).sample([entry for entry in entries() if len(entry.questions) > 1], 100)
    asked, paraphrases = (embed(client, *(entry.questions[i] for entry in drawn)) for i in (0, 1))
    nearness = asked @ paraphrases.T
    own = nearness.diagonal()[:, None]
    assert (own > nearness).sum() / (100 * 99) > 0.7
    question, near, far = embed(
        client,
        "What is the capital of Japan?",
        "Which city is the capital of Japan?",
        "How do I sort a list in Python?",
    )
    assert question @ near > question @ far


def test_the_mistral_client_gets_the_same_embeddings(server, client):
    with mistralai.client.Mistral(server_url=server.url, api_key="none", timeout_ms=120_000) as mistral:
        answer = mistral.embeddings.create(model=EMBED, inputs=[CHEESE, "Hello"])
    np.testing.assert_allclose([item.embedding for item in answer.data], embed(client, CHEESE, "Hello"), atol=1e-2)
    assert answer.usage.total_tokens > 0


def test_many_inputs_come_back_in_order(client):
    asked = [question for question, _ in questions()[:100]]
    together = embed(client, *asked)
    for i in (0, 31, 32, 99):
        assert together[i] @ embed(client, asked[i])[0] > 0.999
    assert embed(client, CHEESE, dimensions=16).shape == (1, 16)
