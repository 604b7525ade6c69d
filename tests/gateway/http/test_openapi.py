"""The OpenAPI document says what the doors do: bodies, answers, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.http.app import BODIES
from gateway.http.openapi import ALWAYS_THERE
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.openai_answers import error_keys

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "tiny", "prompt": "Hi"},
    "/v1/responses": {"model": "tiny", "input": "Hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [40]},
}


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([40, 41])))) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return httpx.get(url + "/openapi.json").json()


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known


def test_every_route_has_its_body_and_its_errors(document: Any) -> None:
    assert set(document["paths"]) == {*ALWAYS_THERE, "/metrics"}
    assert [one["name"] for one in document["paths"]["/v1/models/{name}"]["get"]["parameters"]] == ["name"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("requestBody" in operation) == (method == "post" and path in BODIES)
            assert "422" not in operation["responses"]
            assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"])
    assert document["components"]["schemas"]["ModelName"]["enum"] == ["tiny", "tiny-latest"]


def test_answers_have_what_the_document_promises(url: str, document: Any) -> None:
    for path in (set(ALWAYS_THERE) & set(document["paths"])) - {"/v1/models/{name}", "/v1/embeddings"}:
        answer = httpx.post(url + path, json=GOOD[path]) if path in BODIES else httpx.get(url + path)
        assert answer.status_code == 200, answer.text
        assert set(ALWAYS_THERE[path]) <= set(answer.json())
        refused = httpx.post(url + path, json=GOOD[path] | {"model": 3}) if path in BODIES else None
        assert refused is None or set(refused.json()["error"]) == error_keys(path)
