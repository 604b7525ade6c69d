"""What a gateway replica imports and pickles, and what failures of a coordinator become."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from cluster.errors import CoordinatorLost, MantaError, ModelLoading
from cluster.messages import ModelCard, Request, TokenChunk
from gateway.answer.choice import Usage
from gateway.coordinators.health import MAX_AGE_S, Health, ModelHealth, Phase
from gateway.frontend import Frontend
from gateway.request.protocol import ChatCompletionRequest, Message
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, tokens_script


def run_python(code: str) -> str:
    """In a process of its own: importing Serve warns, and what is imported is the question."""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_gateway_never_imports_torch(tokenizer_directory: Path) -> None:
    code = f"""
import sys
import gateway.service
from dataclasses import replace
from pathlib import Path
from gateway.text.tokenizer import HuggingFaceTokenizer
tokenizer = HuggingFaceTokenizer(Path({str(tokenizer_directory)!r}))
tokenizer.encode_chat([{{"role": "user", "content": "Hi"}}])
import mistral_common.tokens.tokenizers.mistral
print(sorted({{"torch", "router_service", "experts_service"}} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_a_gateway_is_pickled_small() -> None:
    code = """
from ray import cloudpickle
from gateway.service import Gateway
print(len(cloudpickle.dumps(Gateway.func_or_class)))
"""
    assert int(run_python(code)) < 20_000


def test_failures_of_a_coordinator_have_their_class() -> None:
    code = """
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from cluster.errors import ExpertUnavailable
from gateway.coordinators.client import manta_error
wrapped = RayTaskError("generate", "traceback", ExpertUnavailable("no expert", retry_after_s=4.0))
print(manta_error(wrapped).retry_after_s, manta_error(wrapped.as_instanceof_cause()).message)
for error in (ActorDiedError(), BackPressureError(1, 1), KeyError("x"), TimeoutError()):
    print(type(manta_error(error)).__name__)
"""
    lines = run_python(code).splitlines()
    assert lines == ["4.0 no expert", "CoordinatorLost", "Overloaded", "KeyError", "Unavailable"]


def test_leaving_a_stream_early_cancels_the_call() -> None:
    """And only that does: a call that has answered, or failed, ends by itself."""
    code = """
import asyncio
from contextlib import aclosing
from cluster.messages import Request, SamplingParams, TokenChunk
from ray.serve.exceptions import BackPressureError
from gateway.coordinators import client as coordinator_client
from gateway.coordinators.client import ServeCoordinatorClient

coordinator_client.LAST_TOKENS_S = 0.1

class Response:
    cancelled = False
    def __init__(self, client, tokens, error, returns):
        self.client, self.tokens, self.error, self.returns = client, tokens, error, returns
    def __await__(self):
        return self.answer().__await__()
    async def answer(self):
        for position in range(self.tokens):
            reason = "length" if position == 2 else None
            self.client._inbox.deliver((TokenChunk("r", 0, position, (7,), finish_reason=reason),))
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        await asyncio.sleep(0 if self.returns else 60)
    def cancel(self):
        self.cancelled = True

class Generate:
    def remote(self, request, gateway):
        return self.response

async def run(take, tokens, error=None, returns=True):
    client = ServeCoordinatorClient(None)
    client._handle = client._generate = Generate()
    client._generate.response = Response(client, tokens, error, returns)
    try:
        async with aclosing(client.generate(Request("r", (1,), SamplingParams(3), 0))) as stream:
            async for chunk in stream:
                take -= 1
                if not take:
                    break
        error = None
    except Exception as raised:
        error = type(raised).__name__
    print(client._generate.response.cancelled, error)

asyncio.run(run(take=1, tokens=1, returns=False))
asyncio.run(run(take=9, tokens=3))
asyncio.run(run(take=9, tokens=3, returns=False))
asyncio.run(run(take=9, tokens=1, error=BackPressureError(1, 1)))
asyncio.run(run(take=9, tokens=1))
"""
    assert run_python(code).splitlines() == [
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
        assert len(asked) == 1
        # Another gateway may have said by now that the model is ready; what this one knew a moment ago refused it once.
        await health.require((card,))
        await health.require((card,))
        assert len(asked) == 2

    asyncio.run(run())


def test_a_model_whose_coordinator_misses_experts_is_not_ready(card: ModelCard) -> None:
    """Serve calls a replica running whose shard is being restarted; only the coordinator knows that rows wait."""
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
        for _ in range(2):  # a coordinator that cannot be asked says nothing of the experts
            await asyncio.sleep(0.55)
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
    """What it imports and builds before, 0.6 s, was told as the longest time that anybody waited."""
    code = """
import asyncio, time, types
from ray import serve
from cluster.config import GatewayConfig
import gateway.service
from gateway.service import GatewayReplica
name = types.SimpleNamespace(unique_id="r")
config = types.SimpleNamespace(graceful_shutdown_timeout_s=60.0)
serve.get_replica_context = lambda: types.SimpleNamespace(replica_id=name, _deployment_config=config)
build_app = gateway.service.build_app

def build_slowly(frontend):
    while time.thread_time() < until:
        pass
    return build_app(frontend)

gateway.service.build_app = build_slowly

async def start():
    global until
    replica = GatewayReplica(GatewayConfig(), ())
    until = time.thread_time() + 0.2
    replica.__serve_build_asgi_app__()
    watch = replica.frontend.metrics.loop
    await asyncio.sleep(0.1)
    return watch

watch = asyncio.run(start())
count = [s.value for m in watch._blocks.collect() for s in m.samples if s.name.endswith("_count")][0]
print(count > 1, watch.longest[0] < 0.1)
"""
    assert run_python(code).split() == ["True", "True"]
