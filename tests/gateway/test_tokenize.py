"""/tokenize and /detokenize in vLLM's shapes, the model list as clients parse it, and /load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mistralai.client.models
import pytest
from mistralai.client import Mistral

from cluster.config import GatewayConfig
from cluster.messages import ModelCard
from gateway.coordinators.health import Health
from gateway.frontend import Frontend
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.answer.test_round_trip import LAYOUTS
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, ready, tokens_script

TEXT = "Grüße 👩‍🚀, 你好"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.05))


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, coordinator: ScriptedCoordinator) -> Iterator[str]:
    with http_server(build_frontend(model_card(request.getfixturevalue("tokenizer_directory")), coordinator)) as url:
        yield url


def test_a_prompt_to_tokens_and_back(url: str, tokenizer: HuggingFaceTokenizer) -> None:
    answer = httpx.post(url + "/tokenize", json={"model": "tiny", "prompt": TEXT}).json()
    ids = list(tokenizer.encode(TEXT))
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    bare = httpx.post(url + "/tokenize", json={"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True})
    assert bare.json()["tokens"] == ids[1:]
    pieces = bare.json()[
        "token_strs"
    ]  # the vocabulary's, as vLLM has them; they were texts, broken where a character was
    assert pieces == [tokenizer.piece(i) for i in ids[1:]]
    assert pieces[0] == "G"
    assert {"Ł", "Ġ"} & set("".join(pieces)), "bytes have their stand-ins"
    assert "\ufffd" not in "".join(pieces)
    assert httpx.post(url + "/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": "<s>" + TEXT}
    assert httpx.post(url + "/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": TEXT}


def test_messages_to_the_tokens_that_a_chat_would_have(url: str, coordinator: ScriptedCoordinator) -> None:
    ids = httpx.post(url + "/tokenize", json={"model": "tiny", "messages": USER}).json()["tokens"]
    httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, "max_tokens": 1})
    assert ids == list(coordinator.requests[-1].prompt_token_ids)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt"),
        ("/tokenize", {"messages": USER, "add_special_tokens": 1}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "king"}]}, 400, "messages[0].role"),
        ("/tokenize", {"prompt": "x" * 8000}, 400, "prompt"),
        ("/tokenize", {"model": "absent", "prompt": "x"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, 400, "chat_template"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [5, 320]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [5] * 257}, 400, "tokens"),
    ],
)
def test_what_is_wrong_is_named(url: str, path: str, body: dict[str, Any], status: int, param: str) -> None:
    answer = httpx.post(url + path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_no_more_ids_than_the_context_has_become_text(url: str) -> None:
    """Two million were taken, and looked at one by one on the event loop."""
    assert httpx.post(url + "/detokenize", json={"tokens": [40] * 256}).status_code == 200
    error = httpx.post(url + "/detokenize", json={"tokens": [40] * 100_000}).json()["error"]
    assert error["message"] == "tokens: 100000 tokens are over the model's context of 256 tokens"
    assert httpx.post(url + "/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("layout", ["a template without tools", "v3", "Tekken v11"])
def test_ids_of_padded_embeddings_have_no_text(tmp_path: Path, layout: str, coordinator: ScriptedCoordinator) -> None:
    """mistral-common's tokenizers raise for them, which was a 500."""
    tokenizer = LAYOUTS[layout](tmp_path)
    size = tokenizer.vocab_size
    card = model_card(tmp_path, vocab_size=size + 64)
    frontend = Frontend(
        GatewayConfig(),
        (card,),
        {card.application: tokenizer},
        {card.application: coordinator},
        Health((card,), ready),
    )
    ids = list(tokenizer.encode("Hello", add_special_tokens=False))
    with http_server(frontend) as url:
        for more in ([], [size], [size + 63]):
            assert httpx.post(url + "/detokenize", json={"tokens": [*ids, *more]}).json() == {"prompt": "Hello"}
        assert httpx.post(url + "/detokenize", json={"tokens": [size]}).json() == {"prompt": ""}
        assert httpx.post(url + "/detokenize", json={"tokens": [size + 64]}).status_code == 400


def test_load_counts_what_is_being_answered(url: str) -> None:
    assert httpx.get(url + "/load").json() == {"server_load": 0}
    body = {"model": "tiny", "messages": USER, "stream": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body) as response:
        chunks = response.iter_bytes()  # kept: httpx hangs up when it is collected
        next(chunks)
        assert httpx.get(url + "/load").json() == {"server_load": 1}


def test_the_models_are_what_mistrals_client_parses(url: str, card: ModelCard) -> None:
    with Mistral(api_key="none", server_url=url) as client:
        listed = client.models.list().data
        one = client.models.retrieve(model_id="tiny")
    assert listed is not None
    for model in (*listed, one):
        assert isinstance(model, mistralai.client.models.BaseModelCard)
        assert model.capabilities.completion_chat
        assert model.max_context_length == card.max_model_len
    for path in ("/v1/models", "/v1/models/tiny"):
        answer = httpx.request("GET", url + path, json={"model": "x"})  # some clients send a body with GET
        assert answer.status_code == 200
    entry = httpx.get(url + "/v1/models/tiny").json()
    assert (entry["object"], entry["permission"], entry["type"]) == ("model", [], "base")
