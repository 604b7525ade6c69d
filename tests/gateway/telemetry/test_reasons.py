"""Why requests have no complete answer: one word, the same in figures, logs and answers, and all of them documented."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import pickle
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import grpc
import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.errors import (
    KEY_LIMITS,
    ExpertUnavailable,
    MantaError,
    Overloaded,
    RateLimited,
    RequestError,
    SetupError,
    Shed,
    StepFailed,
    Unavailable,
)
from cluster.messages import ModelCard
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.server.gate import Gate
from gateway.grpc.server.slots import ReadSlots
from gateway.grpc.trailers import FittingContext
from gateway.http.errors import UNKNOWN_ROUTE
from gateway.telemetry.logs import RequestRecord
from gateway.telemetry.request_ends import WARN_EVERY_S, RequestEnds
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, http_server, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.telemetry.test_metrics import samples
from tests.programs import REPOSITORY
from tests.raw_http import WEBSOCKET, asking, exchange
from tests.waiting import wait_for

PAGE = REPOSITORY / "docs" / "logs.md"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def failures(url: str, headers: dict[str, str] | None = None) -> dict[tuple[str, str, str], float]:
    """`manta_request_failures_total` by (model, error, reason)."""
    found = samples(httpx.get(url + "/metrics", headers=headers).text)
    pairs = {labels: value for (name, labels), value in found.items() if name == "manta_request_failures_total"}
    return {tuple(dict(labels)[name] for name in ("model", "error", "reason")): n for labels, n in pairs.items()}


def documented() -> set[str]:
    table = PAGE.read_text().split("\n## Reasons\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def subclasses(cls: type[MantaError]) -> Iterator[type[MantaError]]:
    for one in cls.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_reason_is_on_the_page_and_no_other() -> None:
    classes = {*subclasses(RequestError), *subclasses(Unavailable), Unavailable, StepFailed}
    reasons = {cls.reason for cls in classes} | {*get_args(Shed), *KEY_LIMITS.values(), UNKNOWN_ROUTE, "internal"}
    assert reasons - {"shed"} == documented()
    assert {cls.reason for cls in subclasses(SetupError)} == {"internal"}, "which no request meets"


def test_a_reason_crosses_processes() -> None:
    for error in (Overloaded("full", reason="shed_queue"), RateLimited("slow", limit="tokens per minute")):
        assert pickle.loads(pickle.dumps(error)).reason == error.reason
    assert RateLimited("slow", limit="tokens per minute").reason == "key_tokens"


def test_failures_are_counted_by_reason_over_http(card: ModelCard, tmp_path: Path) -> None:
    """What failed before it was admitted was in no figure."""
    keys, token = tmp_path / "keys.yaml", tmp_path / "token"
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bob")}
    keys.write_text(
        f'- {{id: alice, sha256: "{hashes["alice"]}"}}\n'
        f'- {{id: bob, sha256: "{hashes["bob"]}", requests_per_minute: 1}}\n'
    )
    token.write_text("metrics")
    config = GatewayConfig(
        api_keys_file=str(keys), metrics_token_file=str(token), max_body_bytes=4096, request_timeout_s=2.0
    )
    slow = ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.05, eos=None))
    alice, bob = ({"authorization": f"Bearer {name}"} for name in ("alice", "bob"))
    scrape = {"authorization": "Bearer metrics"}
    with http_server(build_frontend(card, slow, config)) as url:
        answers = [
            httpx.post(url + CHAT, json=BODY | {"temperature": "x"}, headers=alice),
            httpx.post(url + CHAT, json=BODY | {"max_tokens": 9999}, headers=alice),
            httpx.post(url + CHAT, json=BODY | {"model": "other"}, headers=alice),
            httpx.post(url + CHAT, content=b" " * 5000, headers=alice),
            httpx.post(url + "/v1/nothing", json=BODY, headers=alice),
            httpx.post(url + CHAT, json=BODY),
            httpx.post(url + CHAT, json=BODY, headers=alice),
            httpx.post(url + CHAT, json=BODY | {"max_tokens": 1}, headers=bob),
            httpx.post(url + CHAT, json=BODY | {"max_tokens": 1}, headers=bob),
        ]
        with asking(url, CHAT, BODY, "alice"):
            wait_for(lambda: len(slow.requests) == 3, 60, "its sequence")
        wait_for(lambda: any("client_gone" in labels for labels in failures(url, scrape)), 60, "the one that left")
        found = failures(url, scrape)
    said = [(answer.status_code, answer.headers.get("x-manta-reason")) for answer in answers]
    assert said == [
        (400, "bad_request"),
        (400, "context_too_long"),
        (404, "unknown_model"),
        (413, "too_large"),
        (404, "unknown_route"),
        (401, "unauthorized"),
        (504, "deadline"),
        (200, None),
        (429, "key_requests"),
    ]
    assert found == {
        ("", "InvalidRequest", "bad_request"): 1,
        ("tiny", "ContextTooLong", "context_too_long"): 1,
        ("", "ModelNotFound", "unknown_model"): 1,
        ("", "PayloadTooLarge", "too_large"): 1,
        ("", "UnknownRoute", "unknown_route"): 1,
        ("", "Unauthorized", "unauthorized"): 1,
        ("tiny", "DeadlineExceeded", "deadline"): 1,
        ("", "RateLimited", "key_requests"): 1,
        ("tiny", "RequestCancelled", "client_gone"): 1,
    }


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Overloaded("9 requests wait already", reason="shed_queue"), "shed_queue"),
        (ExpertUnavailable("gone"), "experts_missing"),
        (StepFailed("broken"), "engine_failed"),
        (KeyError("x"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_both_doors_say_and_count_the_same_reason(card: ModelCard, error: Exception, reason: str) -> None:
    frontend = build_frontend(card, ScriptedCoordinator(failing_script([], error)))
    with http_server(frontend) as url:
        for stream in (False, True):
            answer = httpx.post(url + CHAT, json=BODY | {"stream": stream})
            assert answer.headers["x-manta-reason"] == reason
        assert failures(url) == {("tiny", failures_name(error), reason): 2}
    frontend = build_frontend(card, ScriptedCoordinator(failing_script([], error)))
    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        request = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hello")])
        for call in (stub.Chat, lambda one: list(stub.ChatStream(one))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request)
            assert dict(refused.value.trailing_metadata())["x-manta-reason"] == reason  # type: ignore[attr-defined]
    [series] = [s for f in frontend.metrics.failures.collect() for s in f.samples if s.name.endswith("_total")]
    assert (series.labels["reason"], series.value) == (reason, 2)


def counted(frontend: Frontend) -> Counter[str]:
    """How many requests failed, by reason."""
    found = [s for family in frontend.metrics.failures.collect() for s in family.samples if s.name.endswith("_total")]
    counts: Counter[str] = Counter()
    for one in found:
        counts[one.labels["reason"]] += int(one.value)
    return counts


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_over_grpc_is_counted_once_however_early(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Those were in no figure who left before their request was admitted, or before all of it was there."""
    slow = ScriptedCoordinator(tokens_script([40], pause_s=60))
    frontend = build_frontend(card, slow)
    request = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hello")])
    waits, is_known = threading.Event(), threading.Event()

    async def never(*_: Any) -> None:
        waits.set()
        await asyncio.sleep(60)

    identify = frontend.access.identify

    def noted(*sent: Any) -> Any:
        is_known.set()
        return identify(*sent)

    with grpc_server(frontend) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        places = ((frontend.chat, lambda: slow.running), (never, waits.is_set))
        for number, (chat, is_there) in enumerate(places, 1):
            monkeypatch.setattr(frontend, "chat", chat)
            leaving = stub.ChatStream(request) if stream else stub.Chat.future(request)
            wait_for(is_there, 15, "the request")
            leaving.cancel()
            wait_for(lambda n=number: counted(frontend) == {"client_gone": n}, 15, "the one that left")  # type: ignore[misc]
        method = f"/manta.v1.Manta/Chat{'Stream' * stream}"
        silent = (channel.stream_stream if stream else channel.stream_unary)(method)
        held = threading.Event()
        monkeypatch.setattr(frontend.access, "identify", noted)
        call = silent(_unsent(held)) if stream else silent.future(_unsent(held))
        wait_for(is_known.is_set, 15, "the call")
        call.cancel()
        wait_for(lambda: counted(frontend) == {"client_gone": 3}, 15, "the one that sent nothing")
        held.set()
        time.sleep(0.2)
    assert counted(frontend) == {"client_gone": 3}


@pytest.mark.parametrize("streams", [False, True])
def test_who_is_gone_while_a_message_waits_to_be_read_is_counted(card: ModelCard, streams: bool) -> None:
    """The RPC's task is cancelled there, and neither the gate's errors nor an RPC's knew of it."""
    frontend = build_frontend(card, ScriptedCoordinator(tokens_script([40])))
    method = f"/manta.v1.Manta/Chat{'Stream' * streams}"

    class Silent:
        """A context whose message does not come."""

        def invocation_metadata(self) -> tuple[()]:
            return ()

        def peer(self) -> str:
            return "ipv4:127.0.0.1:1"

        async def read(self) -> bytes:
            await asyncio.sleep(60)
            return b""

    async def call(gate: Gate) -> None:
        context = FittingContext(Silent())
        async with gate._message(method, chat_pb2.ChatRequest.FromString, context):
            raise AssertionError("there is no message")

    async def run() -> None:
        gate = Gate(frontend.config, frontend.access, frontend.ends)
        gate._reads = ReadSlots(4, max_waiting=9, timeout_s=60, grace_s=60)
        tasks = [asyncio.create_task(call(gate)) for _ in range(3)]  # of one caller one is read, two wait
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in ended] == [asyncio.CancelledError] * 3

    asyncio.run(run())
    assert counted(frontend) == {"client_gone": 3}


def _unsent(until: threading.Event) -> Iterator[bytes]:
    until.wait(60)
    yield from ()


@pytest.mark.parametrize("route", [CHAT, "/v1/responses", "/v1/messages"])
def test_a_fault_in_the_midst_of_a_stream_is_no_client_that_left(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """What broke beside the coordinator closed its tokens, as a client does, and was counted so."""
    frontend = build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("Hello " * 9)[1:])))
    run, numbers = frontend.answer_worker.run, itertools.count()

    async def broken(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == 3:
            raise KeyError("x")
        return await run(*args, **kwargs)

    monkeypatch.setattr(frontend.answer_worker, "run", broken)
    body = BODY | {"stream": True, "max_tokens": 9}
    if route == "/v1/responses":
        body = {"model": "tiny", "input": "Hello", "stream": True}
    with http_server(frontend) as url:
        answer = httpx.post(url + route, json=body)
        assert answer.status_code == 200
        assert "error" in answer.text
    assert counted(frontend) == {"internal": 1}


def test_a_page_of_elsewhere_and_a_websocket_are_refused_with_a_reason(
    card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    """Both were lines without a reason or no line at all, and in no figure."""
    config = GatewayConfig(cors_origins=("https://friend.example",))
    frontend = build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("x"))), config)
    asks = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    with http_server(frontend) as url:
        good = httpx.options(url + CHAT, headers=asks)
        assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://friend.example")
        for changed, why in (
            ({"origin": "https://evil.example"}, "origin"),
            ({"access-control-request-method": "DELETE"}, "method"),
        ):
            refused = httpx.options(url + CHAT, headers=asks | changed)
            assert (refused.status_code, refused.headers["x-manta-reason"]) == (400, "bad_request")
            assert refused.json()["error"]["message"].startswith(f"Disallowed CORS {why}; gateway.cors_origins")
            assert refused.headers["x-manta-request-id"].startswith("req-")
            assert "vary" in refused.headers
        status, headers, _ = exchange(int(url.rpartition(":")[2]), WEBSOCKET)
        assert (status, headers["x-manta-reason"]) == (403, "unknown_route")
    assert counted(frontend) == {"bad_request": 2, "unknown_route": 1}


def failures_name(error: Exception) -> str:
    return type(error).__name__ if isinstance(error, MantaError) else "InternalError"


def test_a_full_gateway_names_its_limit(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    slow = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello " * 40)[1:], pause_s=0.1, eos=None))

    async def two_at_once(url: str) -> list[httpx.Response]:
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as client,
            client.stream("POST", CHAT, json=BODY | {"stream": True}) as first,
        ):
            received = first.aiter_bytes()
            await anext(received)
            return [await client.post(CHAT, json=BODY) for _ in range(2)]

    with http_server(build_frontend(card, slow, GatewayConfig(max_ongoing_requests=1))) as url:
        refused = asyncio.run(two_at_once(url))
    for answer in refused:
        assert (answer.status_code, answer.headers["x-manta-reason"]) == (429, "shed_gateway")
        assert "gateway.max_ongoing_requests" in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "overloaded"


def test_a_bound_that_is_reached_is_warned_of_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    ends = RequestEnds(clock=lambda: now)

    def refuse(error: Exception) -> None:
        record = RequestRecord("http", CHAT, model="tiny")
        record.fail(error)
        ends(record)

    with caplog.at_level(logging.WARNING, "gateway"):
        for _ in range(5):
            refuse(Overloaded("full", reason="shed_queue"))
        refuse(Overloaded("full", reason="shed_gateway"))
        refuse(RateLimited("slow", limit="tokens per minute"))
        refuse(Unavailable("gone"))
        now += WARN_EVERY_S
        refuse(Overloaded("full", reason="shed_queue"))
    said = [record.__dict__["figures"] for record in caplog.records]
    assert [(one["reason"], one["requests"]) for one in said] == [
        ("shed_queue", 1),
        ("shed_gateway", 1),
        ("shed_queue", 5),
    ]
    assert {record.getMessage() for record in caplog.records} == {"load is shed"}
