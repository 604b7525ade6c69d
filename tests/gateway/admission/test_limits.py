"""What a key may ask for, at both doors. Time is a number here, so that every figure is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig
from cluster.errors import RateLimited
from cluster.messages import ModelCard
from gateway.admission.api_keys import ApiKey, digest
from gateway.admission.bucket import Bucket
from gateway.admission.limits import KeyLimits, Limiter
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.waiting import wait_for

BODY = {"model": "tiny", "prompt": [40, 41, 42]}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, **fields: Any) -> KeyLimits:
    return KeyLimits(ApiKey(id="alice", sha256="0" * 64, **fields), clock)


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 90), st.floats(0, 20_000)), max_size=20),
    st.floats(0, 20_000),
)
def test_the_wait_is_true(per_minute: int, takes: list[tuple[float, float]], wanted: float) -> None:
    """Whatever came before: after the wait there is enough, and shortly before there was not."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for pause, amount in takes:
        clock.now += pause
        bucket.take(amount)
    asked_at, wait_s = clock.now, bucket.wait_s(wanted)
    if wait_s > 0.001:
        clock.now = asked_at + wait_s - 0.001
        assert bucket.wait_s(wanted) > 0
    clock.now = asked_at + wait_s + 0.001
    assert bucket.wait_s(wanted) == 0
    assert bucket.level <= per_minute


def test_a_minutes_worth_at_once_then_evenly() -> None:
    clock = Clock()
    key = limits(clock, requests_per_minute=30)
    for _ in range(30):
        key.take_request()
    with pytest.raises(RateLimited, match="30 requests per minute") as refused:
        key.take_request()
    assert refused.value.retry_after_s == pytest.approx(2)
    clock.now += 2.001
    key.take_request()
    with pytest.raises(RateLimited):
        key.take_request()


def test_generated_tokens_delay_the_next_request_only() -> None:
    clock = Clock()
    key = limits(clock, tokens_per_minute=60, requests_per_minute=600)
    key.take_request()
    key.take_prompt(50)
    key.take_output(40)
    with pytest.raises(RateLimited, match="tokens per minute") as refused:
        key.take_request()
    assert refused.value.retry_after_s == pytest.approx(31)
    clock.now += refused.value.retry_after_s
    key.take_request()


def test_a_prompt_over_the_whole_limit_is_served_once_nothing_else_was() -> None:
    clock = Clock()
    key = limits(clock, tokens_per_minute=60)
    key.take_prompt(100)
    with pytest.raises(RateLimited) as refused:
        key.take_prompt(100)
    assert refused.value.retry_after_s == pytest.approx(100)
    clock.now += 100
    key.take_prompt(100)


def test_an_edited_entry_counts_at_once_and_forgets_nothing() -> None:
    clock = Clock()
    limiter = Limiter(CollectorRegistry(), clock)
    key = ApiKey(id="alice", sha256="0" * 64, requests_per_minute=2, max_concurrency=1)
    limiter.of(key).take_request()
    limiter.of(key.model_copy(update={"sha256": "1" * 64, "max_concurrency": 5})).take_request()
    with pytest.raises(RateLimited, match="2 requests per minute"):
        limiter.of(key).take_request()
    assert limiter.of(key).num_running == 2


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40, 41, 42]))


@pytest.fixture
def frontend(card: ModelCard, coordinator: ScriptedCoordinator, clock: Clock, tmp_path: Path) -> Any:
    entries = [
        {"id": "alice", "sha256": digest("a"), "requests_per_minute": 3},
        {"id": "bob", "sha256": digest("b"), "tokens_per_minute": 60},
        {"id": "carol", "sha256": digest("c"), "max_concurrency": 1},
        {"id": "dave", "sha256": digest("d")},
        {"id": "erin", "sha256": digest("e"), "max_concurrency": 3},
    ]
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    config = GatewayConfig(api_keys_file=tmp_path / "keys.json")
    frontend = build_frontend(card, coordinator, config)
    frontend.limiter = Limiter(CollectorRegistry(), clock)
    return frontend


@pytest.fixture
def url(frontend: Any) -> Iterator[str]:
    with http_server(frontend) as url:
        yield url


def post(url: str, key: str, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(url + "/v1/completions", json=BODY | fields, headers=headers, timeout=30)


def test_request_rate_over_http(url: str, clock: Clock) -> None:
    answers = [post(url, "a") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"
    assert answers[3].headers["retry-after"] == "20"
    headers = {"authorization": "Bearer a"}
    assert httpx.get(url + "/v1/models", headers=headers).status_code == 200, "asking for the models is free"
    assert post(url, "d").status_code == 200, "another key goes on"
    assert not any(name.startswith("x-ratelimit") for name in post(url, "d").headers)
    clock.now += 20
    assert [post(url, "a").status_code for _ in range(2)] == [200, 429]


def test_token_rate_over_http(url: str, clock: Clock, coordinator: ScriptedCoordinator) -> None:
    """Each answer costs 3 prompt tokens and 4 generated ones."""
    first = post(url, "b", prompt=[40] * 50)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-tokens"] == "6"
    refused = post(url, "b", prompt=[40] * 20)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "14"
    assert len(coordinator.requests) == 1, "nothing was computed"
    assert post(url, "b").headers["x-ratelimit-remaining-tokens"] == "0"
    assert post(url, "b").status_code == 429
    clock.now += 14
    with httpx.stream(
        "POST", url + "/v1/completions", json=BODY | {"stream": True}, headers={"authorization": "Bearer b"}
    ) as stream:
        assert stream.status_code == 200


def test_requests_at_once(card: ModelCard, frontend: Any, coordinator: ScriptedCoordinator) -> None:
    coordinator._script = tokens_script([40] * 200, pause_s=0.05)
    with http_server(frontend) as url:
        headers = {"authorization": "Bearer c"}
        body = BODY | {"stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, headers=headers) as stream:
            chunks = stream.iter_bytes()  # kept: httpx hangs up when it is collected
            next(chunks)
            refused = post(url, "c")
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert post(url, "d", max_tokens=2).status_code == 200
        of_c = frontend.limiter.of(frontend.access.identify(["Bearer c"], None))
        wait_for(lambda: of_c.num_running == 0, 60, "the end of its stream")
        assert post(url, "c", max_tokens=2).status_code == 200, "the place is free when the client has left"


def test_choices_count_one_by_one(card: ModelCard, frontend: Any, coordinator: ScriptedCoordinator) -> None:
    """A request of n = 16 counted as one: a key of `max_concurrency: 4` had 64 sequences running."""
    coordinator._script = tokens_script([40] * 200, pause_s=0.05)
    with http_server(frontend) as url:
        refused = post(url, "e", n=4)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "n"
        headers = {"authorization": "Bearer e"}
        with httpx.stream(
            "POST", url + "/v1/completions", json=BODY | {"stream": True, "n": 2}, headers=headers
        ) as one:
            chunks = one.iter_bytes()
            next(chunks)
            refused = post(url, "e", n=2, max_tokens=2)
            assert refused.status_code == 429
            assert refused.json()["error"]["message"].startswith("the API key 'erin' is at its limit of 3 choices")
            assert post(url, "e", max_tokens=2).status_code == 200
        limits = frontend.limiter.of(frontend.access.identify(["Bearer e"], None))
        wait_for(lambda: limits.num_running == 0, 10, "the client's leaving to be noticed")
        assert post(url, "e", n=3, max_tokens=2).status_code == 200


def test_the_same_limits_over_grpc(frontend: Any) -> None:
    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        request = chat_pb2.GenerateRequest(model="tiny", token_ids=chat_pb2.TokenIds(ids=[40, 41, 42]))
        metadata = (("authorization", "Bearer a"),)
        for _ in range(2):
            stub.Generate(request, metadata=metadata)
        list(stub.GenerateStream(request, metadata=metadata))
        for call in (stub.Generate, lambda *args, **kwargs: list(stub.GenerateStream(*args, **kwargs))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            trailing = dict(refused.value.trailing_metadata())  # type: ignore[attr-defined]
            assert trailing["retry-after"] == "20"
        stub.Generate(request, metadata=(("authorization", "Bearer d"),))


def test_both_doors_draw_on_one_account_and_it_is_in_the_metrics(frontend: Any, url: str) -> None:
    with grpc_server(frontend) as channel:
        request = chat_pb2.GenerateRequest(model="tiny", token_ids=chat_pb2.TokenIds(ids=[40, 41, 42]))
        for _ in range(2):
            chat_pb2_grpc.MantaStub(channel).Generate(request, metadata=(("authorization", "Bearer a"),))
    assert [post(url, "a").status_code for _ in range(2)] == [200, 429]
    limiter = frontend.limiter
    assert limiter.requests.labels("alice")._value.get() == 3
    assert limiter.tokens.labels("alice", "prompt")._value.get() == 9
    assert limiter.tokens.labels("alice", "generation")._value.get() == 12
    assert limiter.refusals.labels("alice", "requests per minute")._value.get() == 1


def test_the_prefix_cache_is_salted_with_the_keys_id(url: str, coordinator: ScriptedCoordinator) -> None:
    for key in "ad":
        post(url, key)
        headers = {"authorization": f"Bearer {key}"}
        messages = [{"role": "user", "content": "Hi " * 50}]
        httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": messages}, headers=headers)
    assert [request.cache_salt for request in coordinator.requests] == ["alice", "alice", "dave", "dave"]
