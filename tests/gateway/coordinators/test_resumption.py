"""A stream whose coordinators die goes on at another one: no token lost, doubled or changed."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import dataclass

import pytest

from cluster.deadline import Deadline
from cluster.errors import (
    CoordinatorLost,
    EngineDead,
    ExpertUnavailable,
    InvalidRequest,
    Overloaded,
    StepFailed,
    Unavailable,
)
from cluster.messages import Request, SamplingParams, TokenChunk
from gateway.coordinators.resumption import embed, generate

ANSWER = tuple(range(100, 120))


class Mortal:
    """Coordinators that answer ANSWER from where a request stands; each of `deaths` ends one stream early."""

    def __init__(self, *deaths: Death) -> None:
        self.deaths = list(deaths)
        self.requests: list[Request] = []

    async def generate(self, request):
        self.requests.append(request)
        death = self.deaths.pop(0) if self.deaths else None
        for position in range(len(request.output_token_ids), len(ANSWER)):
            if death is not None and position == death.position:
                if death.error is None:
                    return
                raise death.error
            reason = "length" if position == len(ANSWER) - 1 else None
            token = ANSWER[position : position + 1]
            yield TokenChunk(request.request_id, 0, position, token, None, reason, num_cached_tokens=16, queue_s=0.5)


@dataclass(frozen=True)
class Death:
    """Before the token at `position`, with an error; None: the stream just ends."""

    position: int
    error: Exception | None = CoordinatorLost("killed")  # noqa: RUF009


def request(**changes):
    fields = {"request_id": "r", "prompt_token_ids": (1, 2), "sampling": SamplingParams(max_tokens=20), "seed": 7}
    return Request(**{**fields, **changes})


def read(coordinator, asked, timeout_s=5.0):
    async def run():
        return [chunk async for chunk in generate(coordinator, asked, timeout_s)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    "deaths",
    [
        (),
        (Death(0),),
        (Death(7),),
        (Death(19),),
        (Death(5, None),),
        (Death(3), Death(3), Death(4), Death(15)),
        (Death(9, EngineDead("its thread")),),
        (Death(9), Death(9, Overloaded("full")), Death(9, Overloaded("full"))),
    ],
)
def test_every_token_comes_once_and_in_order(deaths):
    coordinator = Mortal(*deaths)
    chunks = read(coordinator, request())
    assert [(c.first_position, c.token_ids) for c in chunks] == [(i, (token,)) for i, token in enumerate(ANSWER)]
    assert [c.finish_reason for c in chunks] == [None] * 19 + ["length"]
    assert len(coordinator.requests) == len(deaths) + 1
    assert len({r.request_id for r in coordinator.requests}) == len(coordinator.requests)
    assert {(r.seed, r.prompt_token_ids) for r in coordinator.requests} == {(7, (1, 2))}


def test_facts_about_the_prompt_come_from_the_coordinator_that_began():
    chunks = read(Mortal(Death(2)), request())
    assert [(c.num_cached_tokens, c.queue_s) for c in chunks][:4] == [(16, 0.5), (16, 0.5), (0, 0), (0, 0)]
    [first, *_] = read(Mortal(Death(0)), request())
    assert (first.num_cached_tokens, first.queue_s) == (16, 0.5)


@pytest.mark.parametrize("error", [InvalidRequest("no"), Unavailable("an expert"), Overloaded("full")])
def test_other_errors_end_the_request_at_once(error):
    coordinator = Mortal(Death(0, error))
    with pytest.raises(type(error)):
        read(coordinator, request())
    assert len(coordinator.requests) == 1


@pytest.mark.parametrize(("timeout_s", "deadline_s"), [(1.0, 60.0), (60.0, 1.0)])
def test_it_gives_up_in_time_when_no_coordinator_comes_back(timeout_s, deadline_s):
    coordinator = Mortal(*[Death(4)] * 1000)
    started = time.monotonic()
    with pytest.raises(CoordinatorLost):
        read(coordinator, request(deadline=Deadline.after(deadline_s)), timeout_s)
    assert time.monotonic() - started < 20, "a third of the other limit"
    assert len(coordinator.requests) > 1


def test_a_coordinator_that_goes_on_is_given_what_is_left_of_the_time():
    """By then the gateway's clock may have been set, and the next coordinator's is another one's anyway."""
    left = []

    class Slow(Mortal):
        async def generate(self, request):
            left.append(pickle.loads(pickle.dumps(request)).deadline.remaining_s)  # as it arrives there
            await asyncio.sleep(0.2)
            async for chunk in super().generate(request):
                yield chunk

    read(Slow(Death(3), Death(9)), request(deadline=Deadline.after(600)))
    first, second, third = left
    assert third > 500
    assert second <= first - 0.2
    assert third <= second - 0.2


def test_a_request_that_steps_failed_with_goes_on_elsewhere_twice():
    """Whatever a request broke, it broke at every coordinator in turn, for five minutes."""
    deaths = [Death(3, StepFailed("a bug", "a")), Death(9), Death(9, StepFailed("a bug", "b"))]
    coordinator = Mortal(*deaths)
    assert [token for chunk in read(coordinator, request()) for token in chunk.token_ids] == list(ANSWER)
    assert [asked.failed_on for asked in coordinator.requests] == [(), ("a",), ("a",), ("a", "b")]
    assert len({asked.request_id for asked in coordinator.requests}) == 4
    once_too_often = Mortal(*deaths, Death(15, StepFailed("a bug", "c")), Death(15))
    with pytest.raises(StepFailed) as raised:
        read(once_too_often, request())
    assert len(once_too_often.requests) == 4
    assert pickle.loads(pickle.dumps(raised.value)).coordinator == "c"


def test_so_do_embeddings():
    asked = []

    class Coordinators:
        async def embed(self, requests):
            asked.append([(one.request_id, one.failed_on) for one in requests])
            raise StepFailed("a bug", f"coordinator-{len(asked)}")

    with pytest.raises(StepFailed):
        asyncio.run(embed(Coordinators(), (request(),), 5.0))
    tried = ("coordinator-1", "coordinator-2")
    assert asked == [[("r", ())], [("r~1", tried[:1])], [("r~2", tried)]]


def test_embeddings_are_asked_of_another_coordinator_under_another_id():
    ids = []

    class Coordinators:
        async def embed(self, requests):
            ids.append([one.request_id for one in requests])
            if len(ids) < 3:
                raise CoordinatorLost("silent")
            return ("one", "two")

    prompts = tuple(request(request_id=name) for name in ("a", "b"))
    assert asyncio.run(embed(Coordinators(), prompts, 5.0)) == ("one", "two")
    assert ids == [["a", "b"], ["a~1", "b~1"], ["a~2", "b~2"]]


def test_the_same_coordinator_again_is_no_second_opinion() -> None:
    """Nobody else can be reached where a gateway is cut off with it: streams failed then (seed 2410)."""
    unanswered = ExpertUnavailable("no answer", coordinator="a", elsewhere=True)
    coordinator = Mortal(Death(3, unanswered), Death(3, unanswered), Death(5, unanswered))
    assert [t for chunk in read(coordinator, request()) for t in chunk.token_ids] == list(ANSWER)
    assert len(coordinator.requests) == 4
    coordinator = Mortal(*[Death(3, unanswered)] * 1000)
    with pytest.raises(ExpertUnavailable):
        read(coordinator, request(), timeout_s=0.2)
    assert 2 < len(coordinator.requests) < 10


def test_a_coordinator_that_no_expert_answers_is_left_once_and_only_for_another() -> None:
    """It may be cut off by itself: its streams failed though others could go on (seed 209 of the simulation)."""
    unanswered = ExpertUnavailable("no answer", coordinator="a", elsewhere=True)
    coordinator = Mortal(Death(3, unanswered))
    assert [t for chunk in read(coordinator, request()) for t in chunk.token_ids] == list(ANSWER)
    assert [(one.output_token_ids, one.failed_on) for one in coordinator.requests] == [((), ()), (ANSWER[:3], ("a",))]

    again = ExpertUnavailable("no answer", coordinator="b", elsewhere=True)
    with pytest.raises(ExpertUnavailable):
        read(Mortal(Death(3, unanswered), Death(5, again)), request())
    with pytest.raises(ExpertUnavailable):
        read(Mortal(Death(3, unanswered), Death(5, unanswered), Death(5, again)), request())
    alone = Mortal(Death(3, ExpertUnavailable("no answer", coordinator="a")))
    with pytest.raises(ExpertUnavailable):
        read(alone, request())
    assert len(alone.requests) == 1
