"""What a gateway replica imports and pickles, and what failures of a coordinator become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from ray.serve._private.replica import Replica, ReplicaActor

from cluster.config import GatewayConfig
from cluster.errors import CoordinatorLost, MantaError, ModelLoading
from cluster.messages import ModelCard, Request, TokenChunk
from gateway.answer.choice import Usage
from gateway.coordinators.health import MAX_AGE_S, Health, ModelHealth, Phase
from gateway.frontend import Frontend
from gateway.request.protocol import ChatCompletionRequest, Message
from gateway.service import _is_ended_by_serve
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, tokens_script
from tests.programs import said_by


def test_a_gateway_never_imports_torch(tokenizer_directory: Path) -> None:
    assert said_by("gateway.gateway_modules", tokenizer_directory).strip() == "[]"


def test_a_gateway_is_pickled_small() -> None:
    assert int(said_by("gateway.pickled_gateway")) < 20_000


def test_failures_of_a_coordinator_have_their_class() -> None:
    lines = said_by("gateway.coordinator_failures").splitlines()
    assert lines == ["4.0 no expert", "CoordinatorLost", "Overloaded", "KeyError", "Unavailable"]


def test_leaving_a_stream_early_cancels_the_call() -> None:
    """And only that does: a call that has answered, or failed, ends by itself."""
    assert said_by("gateway.leave_streams").splitlines() == [
        "True None",
        "False None",
        "False None",
        "False Overloaded",
        "False CoordinatorLost",
    ]


def test_health_asks_at_most_twice_a_second(card: ModelCard) -> None:
    asked = []

    def probe(cards: object) -> dict[str, ModelHealth]:
        asked.append(time.monotonic())
        return {card.application: ModelHealth("starting" if len(asked) == 1 else "ready")}

    async def run() -> None:
        health = Health((card,), probe)
        refused = await asyncio.gather(*(health.require((card,)) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(error, ModelLoading) and "starting" in str(error) for error in refused)
        await asyncio.gather(*(health.models() for _ in range(20)))
        # Another gateway may have said by now that the model is ready; what this one knew a moment ago refused it once.
        await health.require((card,))
        await health.require((card,))

    asyncio.run(run())
    assert len(asked) > 1
    assert all(after - before >= MAX_AGE_S for before, after in pairwise(asked))


def test_a_model_whose_coordinator_misses_experts_is_not_ready(
    card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve calls a replica running whose shard is being restarted; only the coordinator knows that rows wait."""
    monkeypatch.setattr("gateway.coordinators.health.MAX_AGE_S", 60.0)
    card = replace(card, deployments=("coordinator", "expert-0", "expert-1"))
    answers: list[tuple[str, ...] | MantaError] = [("expert-1",), CoordinatorLost("it left"), ()]

    async def missing(asked: ModelCard) -> tuple[str, ...]:
        assert asked == card
        answer = answers.pop(0)
        if isinstance(answer, MantaError):
            raise answer
        return answer

    async def run() -> None:
        health = Health((card,), lambda cards: {card.application: ModelHealth("ready")}, missing)
        with pytest.raises(ModelLoading, match="waiting for expert-1"):
            await health.require([card])
        assert (await health.models())[card.name] == ModelHealth("recovering", ("expert-1",))
        monkeypatch.setattr("gateway.coordinators.health.MAX_AGE_S", 0.0)
        for _ in range(2):  # a coordinator that cannot be asked says nothing of the experts
            assert (await health.models())[card.name].phase == "ready"

    asyncio.run(run())


def test_leaving_early_closes_every_choice(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello " * 20)[1:], pause_s=0.01, eos=None))
    frontend = build_frontend(card, coordinator)

    async def run() -> None:
        body = ChatCompletionRequest(model="tiny", messages=[Message(role="user", content="Hi")], n=4)
        generation = await frontend.chat(body)
        deltas = frontend.generate(generation, Usage(0))
        for _ in range(6):
            await anext(deltas)
        assert coordinator.running == 4
        await deltas.aclose()
        assert (coordinator.running, frontend.num_ongoing) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("min_tokens", [0, 4])
def test_stop_strings_wait_for_min_tokens(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, chunk: int, min_tokens: int
) -> None:
    tokens = [tokenizer.encode(letter)[1] for letter in "abSabSab"]
    coordinator = ScriptedCoordinator(tokens_script(tokens, chunk=chunk))
    frontend = build_frontend(card, coordinator)
    text, ids, usage = asyncio.run(_generate(frontend, min_tokens))
    assert text == ("ab" if min_tokens == 0 else "abSab")
    assert ids == tokens[: 3 if min_tokens == 0 else 6]
    assert usage.completion_tokens == len(ids)
    assert coordinator.running == 0


def test_a_prompt_gets_the_same_requests_alone_and_in_a_list(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    from gateway.request.protocol import CompletionRequest
    from gateway.request.validator import Validator

    validator = Validator(card, tokenizer, GatewayConfig())
    together = validator.completion(CompletionRequest(model="tiny", prompt=["a", "b"], n=2, seed=5)).requests
    alone = validator.completion(CompletionRequest(model="tiny", prompt="b", n=2, seed=5)).requests
    assert [(r.seed, r.choice_index, r.prompt_token_ids) for r in together[2:]] == [
        (r.seed, r.choice_index, r.prompt_token_ids) for r in alone
    ]
    assert len({r.key for r in together}) == 4
    drawn = {validator.completion(CompletionRequest(model="tiny", prompt="b")).requests[0].seed for _ in range(9)}
    assert len(drawn) == 9


def test_a_doubled_token_is_never_shown(card: ModelCard) -> None:
    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        for _ in range(2):
            yield TokenChunk(request.request_id, request.choice_index, 0, (40,))

    with pytest.raises(Exception, match="lost or doubled"):
        asyncio.run(_generate(build_frontend(card, ScriptedCoordinator(script)), 0))


async def _generate(frontend: Frontend, min_tokens: int) -> tuple[str, list[int], Usage]:
    message = Message(role="user", content="Hi")
    body = ChatCompletionRequest(model="tiny", messages=[message], stop=["S"], min_tokens=min_tokens)
    usage = Usage(0)
    text, ids = "", []
    async for delta in frontend.generate(await frontend.chat(body), usage):
        text += delta.text
        ids += delta.token_ids
    return text, ids, usage


def test_requests_go_to_the_first_version_of_a_model_that_is_up(card: ModelCard) -> None:
    """While a new version loads, the old one answers."""
    new, old = replace(card, application="tiny-v2"), replace(card, application="tiny-v1")
    phases: dict[str, Phase] = {"tiny-v2": "loading", "tiny-v1": "ready"}

    async def scenario() -> None:
        health = Health((new, old), lambda cards: {name: ModelHealth(phase) for name, phase in phases.items()})
        assert await health.require((new, old)) == old
        assert (await health.models())["tiny"].phase == "ready"
        phases["tiny-v2"] = "ready"
        await asyncio.sleep(MAX_AGE_S)
        await health.models()
        assert await health.require((new, old)) == new
        phases.update({"tiny-v2": "failed", "tiny-v1": "starting"})
        await asyncio.sleep(MAX_AGE_S)
        assert (await health.models())["tiny"].phase == "failed"
        with pytest.raises(ModelLoading):
            await health.require((new, old))

    asyncio.run(scenario())


def test_a_gateways_loop_is_watched_from_when_it_is_ready() -> None:
    """What is imported and collected before, by Serve as well, was told as the longest time that anybody waited."""
    assert said_by("gateway.watched_gateway").split() == ["True", "True"]


def test_a_gateway_sees_in_rays_own_object_that_serve_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve tells no code of ours. Where another Ray has other names there, watches would not end, without a word."""
    replica, actor = Replica.__new__(Replica), ReplicaActor.__new__(ReplicaActor)
    replica._shutting_down, replica._graceful_shutdown_task = False, None
    actor._replica_impl = replica
    monkeypatch.setitem(ray._private.worker.global_worker.actors, "id", actor)

    async def end() -> None:
        replica._event_loop = asyncio.get_running_loop()
        with suppress(AttributeError):  # of what the replica is made of, and this one is not
            await actor.perform_graceful_shutdown()  # as Serve's controller calls it

    assert not _is_ended_by_serve()
    asyncio.run(end())
    assert _is_ended_by_serve()
