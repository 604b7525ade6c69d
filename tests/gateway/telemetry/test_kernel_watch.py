"""A gateway knows which kernels answer before the first answer, says so at both doors, and warns where they differ."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import httpx
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.messages import ModelCard
from cluster.telemetry.kernels import ProcessKernels
from gateway.answer.chat import model_body
from gateway.coordinators.health import Health
from gateway.frontend import Frontend
from gateway.grpc.messages import kernel_fields
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.telemetry import kernel_watch, metrics_page
from gateway.telemetry.kernel_watch import KernelWatch
from gateway.telemetry.metrics_page import Source
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, ready, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server

COORDINATOR = ProcessKernels("bfloat16", "dot", True, "znver4", "AVX512", "pages in place", "numba")
SHARD = replace(COORDINATOR, attention="", sampling="")
USER = [{"role": "user", "content": "Hi"}]


class Processes:
    """Replicas that say what they compute by; `silent` of each deployment do not answer."""

    def __init__(self) -> None:
        self.told = {"coordinator": [COORDINATOR], "expert-0": [SHARD]}
        self.silent = 0
        self.num_asked = 0

    async def __call__(self, source: Source, _timeout_s: float) -> tuple[list[ProcessKernels], int]:
        self.num_asked += 1
        told = self.told[source.deployment]
        return told[self.silent :], self.silent


@pytest.fixture
def processes() -> Processes:
    return Processes()


@pytest.fixture
def frontend(card: ModelCard, tokenizer: HuggingFaceTokenizer, processes: Processes) -> Frontend:
    card = replace(card, deployments=("coordinator", "expert-0"))
    watch = KernelWatch(processes)
    built = build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:])))
    built.kernels = watch
    built.health = Health((card,), ready, None, watch.look)
    return built


def test_both_doors_say_the_same_of_the_kernels(frontend: Frontend) -> None:
    body = {"model": "tiny", "messages": USER}
    with http_server(frontend) as url, grpc_server(frontend) as channel:
        fingerprint = httpx.post(f"{url}/v1/chat/completions", json=body).json()["system_fingerprint"]
        assert fingerprint.startswith("fp_01234567_"), "known before the first answer"
        stream = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert {event["system_fingerprint"] for event in events} == {fingerprint}
        completion = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Hi"}).json()
        assert completion["system_fingerprint"] == fingerprint
        entry = httpx.get(f"{url}/v1/models/tiny").json()
        assert (entry["system_fingerprint"], entry["batch_invariant"]) == (fingerprint, True)
        [coordinator], [shard] = entry["kernels"]["coordinator"], entry["kernels"]["expert-0"]
        assert (coordinator["matmuls"], coordinator["attention"]) == ("dot", "pages in place")
        assert (shard["matmuls"], shard["attention"]) == ("dot", "")
        stub = chat_pb2_grpc.MantaStub(channel)
        request = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hi")])
        assert stub.Chat(request).system_fingerprint == fingerprint
        assert {chunk.system_fingerprint for chunk in stub.ChatStream(request)} == {fingerprint}
        [model] = stub.ListModels(chat_pb2.ListModelsRequest()).models
        assert (model.system_fingerprint, model.batch_invariant) == (fingerprint, True)
        assert [(one.deployment, one.matmuls) for one in model.kernels] == [("coordinator", "dot"), ("expert-0", "dot")]


def test_replicas_that_differ_are_told_once_and_change_the_fingerprint(
    frontend: Frontend, processes: Processes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool of two kinds of machines gave a stream other tokens after a kill, and nothing said why it could."""
    monkeypatch.setattr(kernel_watch, "MAX_AGE_S", 0.0)
    [card] = frontend.cards

    async def run() -> None:
        watch = frontend.kernels
        await watch.look([card])
        alone = watch.system_fingerprint(card)
        processes.told["coordinator"] = [COORDINATOR] * 2
        await watch.look([card])
        assert watch.system_fingerprint(card) == alone, "of another replica with the same ones"
        assert not caplog.records
        processes.told["expert-0"] = [SHARD, replace(SHARD, matmuls="fma")]
        for _ in range(3):
            await watch.look([card])
        assert watch.system_fingerprint(card) != alone

    with caplog.at_level(logging.WARNING, "gateway"):
        asyncio.run(run())
    [record] = caplog.records
    assert "replicas of expert-0 compute by different kernels" in record.getMessage()


def test_a_group_on_two_tiers_is_told_as_one_and_a_tier_without_replicas_hides_nothing(
    frontend: Frontend, processes: Processes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a tier that had no replica nothing was said at all."""
    monkeypatch.setattr(kernel_watch, "MAX_AGE_S", 0.0)
    [card] = frontend.cards
    card = replace(card, deployments=(*card.deployments, "expert-0-tier1"))
    rounded = replace(SHARD, weights="INT8, groups of 128")

    async def look(*told: ProcessKernels) -> str:
        processes.told["expert-0-tier1"] = list(told)
        await frontend.kernels.look([card])
        return frontend.kernels.system_fingerprint(card)

    none, alike = asyncio.run(look()), asyncio.run(look(SHARD))
    assert none.startswith("fp_01234567_")
    kernels = frontend.kernels.of(card)
    assert kernels is not None
    assert model_body(card, "tiny", alike, kernels)["mixed_replicas"] == []
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "gateway"):
        unlike = asyncio.run(look(rounded))
    assert len({none, alike, unlike}) == 3
    assert "replicas of expert-0 compute by different kernels" in caplog.text
    assert "their numbers are INT8, groups of 128 and bfloat16" in caplog.text
    kernels = frontend.kernels.of(card)
    assert kernels is not None
    body = model_body(card, "tiny", unlike, kernels)
    assert (body["mixed_replicas"], body["batch_invariant"]) == (["expert-0"], False)
    assert [one["weights"] for one in body["kernels"]["expert-0-tier1"]] == [rounded.weights]
    fields = kernel_fields(kernels)
    assert list(chat_pb2.Model(**fields).mixed_replicas) == ["expert-0"]
    assert [one.weights for one in fields["kernels"]] == ["", "", rounded.weights]


def test_only_another_tier_of_a_group_may_have_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was known of it stayed known when its last replica had left."""

    class Deserted:
        def broadcast(self, method: str) -> Deserted:
            assert method == "kernels"
            return self

        async def _fetch_replica_results_async(self) -> list[object]:
            raise DeploymentUnavailableError(DeploymentID("expert-0", "tiny-1"))

    monkeypatch.setattr(metrics_page, "_handle", lambda _: Deserted())
    ask = metrics_page.ServeProcesses("kernels")
    assert asyncio.run(ask(Source("tiny-1", "expert-0-tier1"), 5.0)) == ([], 0)
    with pytest.raises(DeploymentUnavailableError):
        asyncio.run(ask(Source("tiny-1", "expert-0"), 5.0))


def test_a_replica_that_is_silent_for_once_changes_nothing(
    frontend: Frontend, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_watch, "MAX_AGE_S", 0.0)
    [card] = frontend.cards
    processes.told["expert-0"] = [SHARD, replace(SHARD, matmuls="fma")]

    async def run() -> None:
        watch = frontend.kernels
        await watch.look([card])
        known = watch.system_fingerprint(card)
        processes.silent = 1
        await watch.look([card])
        assert watch.system_fingerprint(card) == known

    asyncio.run(run())


def test_processes_are_asked_every_ten_seconds_and_until_all_have_said_it(
    frontend: Frontend, processes: Processes
) -> None:
    [card] = frontend.cards

    async def run() -> None:
        processes.silent = 1
        for _ in range(2):
            await frontend.kernels.look([card])
        assert (processes.num_asked, frontend.kernels.of(card)) == (4, None)
        assert frontend.kernels.system_fingerprint(card) == "fp_01234567"
        processes.silent = 0
        for _ in range(3):
            await frontend.kernels.look([card])
        assert processes.num_asked == 6

    asyncio.run(run())
