"""Arbitrary JSON through the whole of both doors, over real sockets: a valid answer or a 4xx, and the door lives on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.http.app import BODIES
from gateway.request.foreign_fields import IGNORED, REFUSED
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.openai_answers import error_keys
from tests.gateway.test_error_texts import OF_LIBRARIES

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 3},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},  # a chat model has none
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [40]},
}
KEYS = st.sampled_from(["role", "content", "type", "text", "name", "include_usage", "function", "format", "x"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["tiny", "user", "assistant", "text", "auto", "none", "", "Hi"]),
    st.text(max_size=6),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def frontend(request: pytest.FixtureRequest) -> Frontend:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    return build_frontend(card, ScriptedCoordinator(tokens_script([40, 41, 42])))


@pytest.fixture(scope="module")
def http(frontend: Frontend) -> Iterator[httpx.Client]:
    with http_server(frontend) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def channel(request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    with grpc_server(build_frontend(card, ScriptedCoordinator(tokens_script([40, 41, 42])))) as channel:
        yield channel


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Any JSON, and more often a good body with up to three fields that are anything."""
    names = st.sampled_from(sorted({*BODIES[path].model_fields, *IGNORED, *REFUSED}))
    changed = st.dictionaries(names, JSON, max_size=3).map(lambda change: GOOD[path] | change)
    return changed | changed | JSON


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), path=st.sampled_from(sorted(GOOD)))
def test_http(http: httpx.Client, frontend: Frontend, data: st.DataObject, path: str) -> None:
    answer = http.post(path, json=data.draw(bodies(path)))
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == error_keys(path)
        assert not OF_LIBRARIES.search(answer.json()["error"]["message"]), answer.text
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("\n\n")
        assert '"error":{' not in answer.text
    else:
        assert isinstance(answer.json(), dict)
    assert frontend.num_ongoing == 0


SAMPLING = st.builds(
    chat_pb2.Sampling,
    max_tokens=st.none() | st.integers(0, 300),
    min_tokens=st.none() | st.integers(0, 300),
    temperature=st.none() | st.floats(),
    top_p=st.none() | st.floats(),
    top_k=st.none() | st.integers(-5, 2**31 - 1),
    min_p=st.none() | st.floats(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    n=st.none() | st.integers(0, 20),
    stop=st.lists(st.text(max_size=3), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    logit_bias=st.dictionaries(st.integers(0, 400), st.floats(), max_size=3),
    logprobs=st.none() | st.integers(0, 25),
)
MESSAGES = st.lists(
    st.builds(chat_pb2.Message, role=st.sampled_from(["user", "system", "assistant", "king"]), content=st.text()),
    max_size=3,
)
MODELS = st.sampled_from(["tiny", "tiny", "tiny-latest", "absent", ""])
IDS = st.lists(st.integers(0, 330) | st.integers(0, 2**32 - 1), max_size=5)
CALLS = st.one_of(
    st.tuples(
        st.sampled_from(["Chat", "ChatStream"]),
        st.builds(chat_pb2.ChatRequest, model=MODELS, messages=MESSAGES, sampling=SAMPLING),
    ),
    st.tuples(
        st.sampled_from(["Generate", "GenerateStream"]),
        st.builds(chat_pb2.GenerateRequest, model=MODELS, text=st.text(max_size=9), sampling=SAMPLING)
        | st.builds(
            chat_pb2.GenerateRequest, model=MODELS, token_ids=st.builds(chat_pb2.TokenIds, ids=IDS), sampling=SAMPLING
        ),
    ),
    st.tuples(st.just("Tokenize"), st.builds(chat_pb2.TokenizeRequest, model=MODELS, text=st.text())),
    st.tuples(st.just("Detokenize"), st.builds(chat_pb2.DetokenizeRequest, model=MODELS, token_ids=IDS)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=CALLS)
def test_grpc(channel: grpc.Channel, call: tuple[str, Any]) -> None:
    rpc, request = call
    stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
    code, details = None, ""
    try:
        answer = getattr(stub, rpc)(request, timeout=60)
        if rpc.endswith("Stream"):
            assert list(answer)[-1].HasField("usage")
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    assert code is None or code in CODES
    assert not OF_LIBRARIES.search(details)
