"""Embeddings at both doors: inputs of every shape, formats, dimensions, bounds, and models that do the other thing."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from mistralai.client import Mistral

from cluster.config import GatewayConfig
from cluster.errors import CoordinatorLost, InvalidRequest, Overloaded
from cluster.messages import Embedding, ModelCard, Request
from gateway.coordinators.health import Health
from gateway.embeddings import EmbeddingValidator
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.http.app import embeddings_json
from gateway.request.protocol import EmbeddingRequest
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, http_server, model_card, ready, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.raw_http import asking
from tests.waiting import wait_for

SIZE, LENGTH = 16, np.float32(3)  # of what a model makes
TEXTS = ["Hello", "le fromage", "Hello"]


def vector_of(token_ids: tuple[int, ...]) -> Any:
    """Stands for what a model makes of a prompt: a unit vector that only these ids have."""
    vector = np.random.default_rng(token_ids).normal(size=SIZE).astype(np.float32)
    return vector / np.linalg.norm(vector)


class EmbeddingCoordinator(ScriptedCoordinator):
    """Embeds at once, or after `pause_s`."""

    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__(tokens_script([]))
        self.pause_s = pause_s
        self.error: Exception | None = None
        self.cancelled = False
        self.asked_at_once: list[int] = []

    async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
        self.requests += requests
        self.asked_at_once.append(len(requests))
        try:
            await asyncio.sleep(self.pause_s)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error
        return tuple(
            Embedding(r.request_id, r.choice_index, (LENGTH * vector_of(r.prompt_token_ids)).tobytes())
            for r in requests
        )


def build(tokenizer_directory: Path, coordinator: EmbeddingCoordinator, **config: Any) -> Frontend:
    """A chat model and an embedding model behind one gateway."""
    cards: tuple[ModelCard, ...] = (
        model_card(tokenizer_directory),
        model_card(
            tokenizer_directory, name="embed", aliases=("embed-latest",), kind="embedding", hidden_size=SIZE,
            pooling="last", application="embed-00000000",
        ),
    )  # fmt: skip
    tokenizer = HuggingFaceTokenizer(tokenizer_directory)
    chat = ScriptedCoordinator(tokens_script(tokenizer.encode("Hi")[1:]))
    return Frontend(
        GatewayConfig(**config),
        cards,
        dict.fromkeys(("tiny-00000000", "embed-00000000"), tokenizer),
        {"tiny-00000000": chat, "embed-00000000": coordinator},
        Health(cards, ready),
    )


@pytest.fixture
def coordinator() -> EmbeddingCoordinator:
    return EmbeddingCoordinator()


@pytest.fixture
def url(tokenizer_directory: Path, coordinator: EmbeddingCoordinator) -> Iterator[str]:
    with http_server(build(tokenizer_directory, coordinator, max_embedding_inputs=4, max_embedding_tokens=300)) as url:
        yield url


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", json={"model": "embed", **body}, timeout=30)


@pytest.mark.parametrize(
    ("value", "count"),
    [("Hello", 1), (TEXTS, 3), ([5, 6, 7], 1), ([[5, 6], [7]], 2), (["Hello", [5, 6]], 2)],
    ids=["text", "texts", "ids", "lists-of-ids", "mixed"],
)
def test_inputs_of_every_shape(
    url: str, coordinator: EmbeddingCoordinator, tokenizer: HuggingFaceTokenizer, value: Any, count: int
) -> None:
    answer = post(url, input=value).json()
    assert set(answer) == {"id", "object", "model", "data", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "embed")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(count)]
    prompts = [request.prompt_token_ids for request in coordinator.requests]
    if isinstance(value, str) or isinstance(value[0], str):
        values = [value] if isinstance(value, str) else value
        assert prompts == [tokenizer.encode(one) if isinstance(one, str) else tuple(one) for one in values]
    for item, prompt in zip(answer["data"], prompts, strict=True):
        np.testing.assert_allclose(item["embedding"], vector_of(prompt), atol=1e-6)
    tokens = sum(map(len, prompts))
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert {request.pooling for request in coordinator.requests} == {"last"}
    assert len({request.key for request in coordinator.requests}) == count


def test_base64_is_the_same_numbers(url: str) -> None:
    floats = post(url, input=TEXTS, encoding_format="float").json()["data"]
    packed = post(url, input=TEXTS, encoding_format="base64").json()["data"]
    for one, other in zip(floats, packed, strict=True):
        decoded = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
        np.testing.assert_array_equal(decoded, np.array(one["embedding"], dtype=np.float32))


def test_without_scaling_a_vector_has_its_own_length(url: str, tokenizer: HuggingFaceTokenizer) -> None:
    expected = LENGTH * vector_of(tokenizer.encode("Hello"))
    for dimensions in (SIZE, 3):
        raw = post(url, input="Hello", normalize=False, dimensions=dimensions).json()["data"][0]["embedding"]
        np.testing.assert_allclose(raw, expected[:dimensions], atol=1e-6)
    scaled = post(url, input="Hello", normalize=True).json()
    assert scaled["data"] == post(url, input="Hello").json()["data"]


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "i1"), ("uint8", "u1"), ("binary", "i1"), ("ubinary", "u1")])
@pytest.mark.parametrize("dimensions", [SIZE, 11])
def test_small_numbers_mean_the_same_vector(
    url: str, tokenizer: HuggingFaceTokenizer, dtype: str, kind: str, dimensions: int
) -> None:
    """Mistral's spelling: a byte a number, or a bit, eight to a byte. Other clients get them packed in base64."""
    exact = vector_of(tokenizer.encode("Hello"))[:dimensions]
    asked = {"input": "Hello", "output_dtype": dtype, "dimensions": dimensions}
    numbers = np.array(post(url, **asked).json()["data"][0]["embedding"])
    packed = base64.b64decode(post(url, **asked, encoding_format="base64").json()["data"][0]["embedding"])
    np.testing.assert_array_equal(np.frombuffer(packed, dtype=kind), numbers)
    if dtype.endswith("int8"):
        around_zero = numbers - (128 if dtype == "uint8" else 0)
        assert np.abs(around_zero).max() == 127
        cosine = around_zero @ exact / np.linalg.norm(around_zero) / np.linalg.norm(exact)
        assert cosine > 0.9999
    else:
        bits = np.unpackbits((numbers + (128 if dtype == "binary" else 0)).astype(np.uint8))
        np.testing.assert_array_equal(bits[:dimensions], exact > 0)
        assert len(numbers) == -(-dimensions // 8)


def test_two_thousand_inputs_are_asked_for_in_parts(
    tokenizer_directory: Path, coordinator: EmbeddingCoordinator, tokenizer: HuggingFaceTokenizer
) -> None:
    """OpenAI takes 2,048 and langchain sends 1,000, which were 400."""
    texts = [str(i) for i in range(2048)]
    with http_server(build(tokenizer_directory, coordinator)) as url:
        answer = post(url, input=texts)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        refused = post(url, input=[*texts, "one more"])
    assert [item["index"] for item in data] == list(range(2048))
    for i in (0, 63, 64, 2047):
        np.testing.assert_allclose(data[i]["embedding"], vector_of(tokenizer.encode(texts[i])), atol=1e-6)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert max(coordinator.asked_at_once) <= 64, "a call of thousands would keep the event loop"


def test_what_is_past_the_most_tokens_is_not_tokenized(tokenizer_directory: Path) -> None:
    """Eight megabytes of inputs were tokenized before they were found to be seven times too many."""
    card = model_card(tokenizer_directory, kind="embedding", hidden_size=SIZE)
    tokenizer, read = HuggingFaceTokenizer(tokenizer_directory), []
    with pytest.MonkeyPatch.context() as patch:
        encode = tokenizer.encode
        patch.setattr(tokenizer, "encode", lambda text, **options: read.append(text) or encode(text, **options))
        validator = EmbeddingValidator(card, tokenizer, GatewayConfig(max_embedding_tokens=300))
        with pytest.raises(InvalidRequest, match="input: over 300 tokens in all"):
            validator.job(EmbeddingRequest(input=["x y z " * 25] * 2000, num_bytes=0))
    assert 2 <= len(read) <= 6


def test_a_large_answer_takes_little_more_than_its_size(tokenizer_directory: Path) -> None:
    """2,048 vectors of 4,096 numbers took 1.3 GB: their JSON was made number by number."""
    card = model_card(tokenizer_directory, kind="embedding", hidden_size=1024)
    validator = EmbeddingValidator(card, HuggingFaceTokenizer(tokenizer_directory), GatewayConfig())
    job = validator.job(EmbeddingRequest(input=["a"] * 1000, num_bytes=0))
    answer = [np.linspace(-1, 1, 1024, dtype=np.float32) / 3] * 1000
    Path("/proc/self/clear_refs").write_text("5")  # the most that is resident is counted anew
    before = resident_bytes("VmRSS")
    content = embeddings_json(job, answer, None)
    assert resident_bytes("VmHWM") - before < 4 * len(content)
    data = json.loads(content)["data"]
    assert [item["index"] for item in data] == list(range(1000))
    np.testing.assert_array_equal(data[-1]["embedding"], answer[-1])


def resident_bytes(name: str) -> int:
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def test_a_part_waits_where_the_coordinator_is_full_by_now(tokenizer_directory: Path) -> None:
    """All 32 parts had to find room at once: a long list was refused whenever a busy server was full for a moment."""

    class FullForAMoment(EmbeddingCoordinator):
        async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
            self.error = Overloaded("full") if len(self.asked_at_once) in (1, 2, 5) else None
            return await super().embed(requests)

    with http_server(build(tokenizer_directory, busy := FullForAMoment())) as url:
        answer = post(url, input=[str(i) for i in range(300)])
    assert answer.status_code == 200, answer.text
    assert busy.asked_at_once == [64, 64, 64, 64, 64, 64, 64, 44]


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
def test_fewer_dimensions_are_scaled_again(url: str, field: str) -> None:
    whole = np.array(post(url, input="Hello").json()["data"][0]["embedding"])
    short = np.array(post(url, input="Hello", **{field: 3}).json()["data"][0]["embedding"])
    np.testing.assert_allclose(short, whole[:3] / np.linalg.norm(whole[:3]), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [[1], [2, "a"]]}, "input[1][1]"),
        ({"input": [1, 10**6]}, "input[1]"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * 5}, "input"),
        ({"input": [1] * 300}, "input"),
        ({"input": [[1], [1] * 300]}, "input[1]"),
        ({"input": "word " * 100_000}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": SIZE + 1}, "dimensions"),
        ({"input": "a", "output_dimension": SIZE + 1}, "output_dimension"),
        ({"input": "a", "dimensions": "3"}, "dimensions"),
        ({"input": "a", "output_dtype": "int4"}, "output_dtype"),
        ({"input": "a", "normalize": "no"}, "normalize"),
        ({"input": "a", "normalized": False}, "normalized"),
        ({"input": "a", "embedding_type": "binary"}, "embedding_type"),
        ({"input": [[40] * 150] * 3}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "model": "tiny"}, "model"),
    ],
)
def test_a_wrong_field_is_named(url: str, coordinator: EmbeddingCoordinator, body: dict[str, Any], param: str) -> None:
    answer = post(url, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not coordinator.requests


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}), ("completions", {"prompt": "Hi"})],
)
def test_an_embedding_model_does_not_chat(url: str, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "embed-latest", **body}, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert "served for chat: tiny" in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/{path}", json={"model": "tiny", **body}, timeout=30).status_code == 200


def test_any_name_means_the_first_model_of_the_kind(
    tokenizer_directory: Path, coordinator: EmbeddingCoordinator
) -> None:
    with http_server(build(tokenizer_directory, coordinator, accept_any_model=True)) as url:
        assert post(url, input="Hello", model="text-embedding-3-small").json()["model"] == "embed"
        assert post(url, input="Hello", model="tiny").status_code == 400


def test_models_say_what_they_do(url: str) -> None:
    models = {model["id"]: model for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert models["tiny"]["capabilities"]["completion_chat"]
    assert not models["embed"]["capabilities"]["completion_chat"]


def test_a_late_or_failed_one_is_an_error(tokenizer_directory: Path) -> None:
    slow = EmbeddingCoordinator(pause_s=60)
    with http_server(build(tokenizer_directory, slow, request_timeout_s=0.2)) as url:
        assert post(url, input="Hello").status_code == 504
    assert slow.cancelled
    full = EmbeddingCoordinator()
    full.error = Overloaded("full")
    with http_server(build(tokenizer_directory, full)) as url:
        assert post(url, input="Hello").status_code == 429


def test_another_coordinator_computes_them_when_one_is_lost(tokenizer_directory: Path) -> None:
    class Lost(EmbeddingCoordinator):
        async def embed(self, requests: tuple[Request, ...]) -> tuple[Embedding, ...]:
            if not self.requests:
                self.requests += requests
                raise CoordinatorLost("killed")
            return await super().embed(requests)

    with http_server(build(tokenizer_directory, Lost())) as url:
        assert post(url, input="Hello").status_code == 200
    with http_server(build(tokenizer_directory, gone := Lost(), resume_timeout_s=0.001)) as url:
        gone.error = CoordinatorLost("killed again")
        assert post(url, input="Hello").status_code == 503


def test_a_client_that_leaves_cancels_them(tokenizer_directory: Path) -> None:
    slow = EmbeddingCoordinator(pause_s=60)
    with http_server(build(tokenizer_directory, slow)) as url:
        with asking(url, "/v1/embeddings", {"model": "embed", "input": "Hello"}):
            wait_for(lambda: slow.requests, 60, "the work")
        wait_for(lambda: slow.cancelled, 60, "the end of the work")


def test_stock_clients(url: str, tokenizer: HuggingFaceTokenizer) -> None:
    expected = [vector_of(tokenizer.encode(text)) for text in TEXTS]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="embed", input=TEXTS)
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-6)
    with Mistral(api_key="none", server_url=url) as mistral:
        embeddings = mistral.embeddings.create(model="embed", inputs=TEXTS)
        np.testing.assert_allclose([item.embedding for item in embeddings.data], expected, atol=1e-6)


def test_grpc(tokenizer_directory: Path, coordinator: EmbeddingCoordinator, tokenizer: HuggingFaceTokenizer) -> None:
    with grpc_server(build(tokenizer_directory, coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        texts = [chat_pb2.EmbedInput(text=text) for text in TEXTS]
        answer = stub.Embed(chat_pb2.EmbedRequest(model="embed", inputs=texts), timeout=30)
        assert [item.index for item in answer.embeddings] == [0, 1, 2]
        prompts = [tokenizer.encode(text) for text in TEXTS]
        np.testing.assert_allclose(
            [item.values for item in answer.embeddings], [vector_of(prompt) for prompt in prompts], atol=1e-6
        )
        assert answer.usage.total_tokens == sum(map(len, prompts))
        ids = [chat_pb2.EmbedInput(token_ids=chat_pb2.TokenIds(ids=[5, 6]))]
        short = stub.Embed(chat_pb2.EmbedRequest(model="embed", inputs=ids, dimensions=2), timeout=30)
        assert len(short.embeddings[0].values) == 2
        raw = stub.Embed(chat_pb2.EmbedRequest(model="embed", inputs=ids, normalize=False), timeout=30)
        np.testing.assert_allclose(raw.embeddings[0].values, LENGTH * vector_of((5, 6)), atol=1e-6)
        [small] = stub.Embed(chat_pb2.EmbedRequest(model="embed", inputs=ids, output_dtype="ubinary")).embeddings
        assert (list(small.values), small.packed) == ([], np.packbits(vector_of((5, 6)) > 0).tobytes())
        mixed = stub.Embed(chat_pb2.EmbedRequest(model="embed", inputs=[*texts, *ids]), timeout=30)
        np.testing.assert_allclose(
            [item.values for item in mixed.embeddings], [vector_of(prompt) for prompt in (*prompts, (5, 6))], atol=1e-6
        )
        for request in (
            chat_pb2.EmbedRequest(model="tiny", inputs=texts),
            chat_pb2.EmbedRequest(model="embed"),
            chat_pb2.EmbedRequest(model="embed", inputs=[*texts, {}]),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Embed(request, timeout=30)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
