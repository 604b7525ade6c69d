"""The simulated fleet against a real one: the same requests, the same kills, and what comes of them within a fifth.

Two groups with two to three replicas each, one coordinator, one gateway. What things cost is measured of the real one:
a step as its engine counts it meanwhile, since machines get slower and faster; a batch by one client before and after;
a restart by a kill of its own. The rest is foretold: what requests that come by chance see of it, when replicas are
added, lost, back and taken away.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import fmean

import httpx
import numpy as np
import pytest

from cluster.commands.bench.serve.figures import percentile
from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import MantaError
from cluster.messages import Request, TokenChunk
from cluster.simulation.coordinator import EngineCosts
from cluster.simulation.faults import Fault
from cluster.simulation.gateway import Arrival
from cluster.simulation.invariants import Invariants
from cluster.simulation.members import FleetSpec
from cluster.simulation.scenario import Run, Scenario
from cluster.simulation.shards import ShardCosts
from tests.conftest import Server, running_server
from tests.end_to_end.failures.test_kills import num_lanes, of_experts
from tests.steady_streams import choices_of_stream
from tests.waiting import wait_for

NUM_LAYERS, TOP_K, GROUPS = 4, 2, 2
SCALING = ScalingConfig(
    min_replicas=2, max_replicas=3, target_busy_fraction=0.008, max_queue_s=1.0, upscale_delay_s=5, downscale_delay_s=10
)
FEWEST = GROUPS * SCALING.min_replicas
CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    engine: {{dtype: float32, max_model_len: 1024, kv_cache_gib: 0.1, microbatches: 1}}
    experts: {{groups: [[0, 1, 2, 3], [4, 5, 6, 7]], scaling: {SCALING.model_dump_json()}}}
"""
PROMPT_TOKENS, NUM_TOKENS = 8, (8, 16, 24)
MEASURED_TOKENS, PAUSE_S, MEASURED_S = 16, 0.5, 15.0
LOADS = ((20.0, 0.4), (45.0, 6.0), (50.0, 0.4))  # for so many seconds, times the load that one replica is to carry
FOR_S = sum(seconds for seconds, _ in LOADS)
KILLS = ((8.0, "kill shard", 0), (50.0, "kill supervisor", 3), (90.0, "kill shard", 2))  # when, what, which replica
GOOD_GAP_S = 1.0  # an answer without a longer one is good
LOOK_S = 1.0  # the page is kept for as long
WITHIN = 0.2
LATENCY_S = 2e-5  # over memory, within a machine
RESTART_S = 1.75  # of a simulated restart, beside its load: Ray's own, and until the coordinator is told

pytestmark = pytest.mark.long


@dataclass
class Answer:
    """One, as its client saw it."""

    wanted: int  # tokens
    asked: float
    times: list[float] = field(default_factory=list)  # at which tokens came
    num_tokens: int = 0

    @property
    def is_good(self) -> bool:
        gaps = [after - before for before, after in pairwise([self.asked, *self.times])]
        return self.num_tokens == self.wanted and max(gaps) <= GOOD_GAP_S


@dataclass
class Seen:
    """By all clients, and how many lanes there were at each look."""

    answers: list[Answer] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [after - before for one in self.answers for before, after in pairwise(one.times)]

    def figures(self) -> dict[str, float]:
        gaps = self.gaps
        return {
            "goodput, tokens/s": sum(one.num_tokens for one in self.answers if one.is_good) / FOR_S,
            "gap, ms": 1e3 * fmean(gaps),
            "gap p50, ms": 1e3 * percentile(gaps, 0.5),
            "gap p90, ms": 1e3 * percentile(gaps, 0.9),
            "gap p99, ms": 1e3 * percentile(gaps, 0.99),
            "longest gap, ms": 1e3 * max(gaps),
            "first token p50, ms": 1e3 * percentile([one.times[0] - one.asked for one in self.answers], 0.5),
            "replicas, on average": fmean(self.lanes),
            "seconds with more than the fewest": LOOK_S * sum(lanes > FEWEST for lanes in self.lanes),
            "seconds with fewer": LOOK_S * sum(lanes < FEWEST for lanes in self.lanes),
        }


# The real one


async def ask(client: httpx.AsyncClient, began: float, number: int, num_tokens: int, seen: Seen) -> None:
    answer = Answer(num_tokens, time.monotonic() - began)
    seen.answers.append(answer)
    body = {
        "model": "demo", "prompt": [3 + (97 * number + i) % 2000 for i in range(PROMPT_TOKENS)], "temperature": 0,
        "max_tokens": num_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    try:
        async for choices in choices_of_stream(client, body):
            if tokens := sum(len(choice["token_ids"]) for choice in choices):
                answer.times.append(time.monotonic() - began)
                answer.num_tokens += tokens
    except (httpx.HTTPError, AssertionError) as error:
        seen.failures.append(repr(error))


def asked(server: Server, of_client: Callable[[httpx.AsyncClient, float, Seen], Sequence[Awaitable[None]]]) -> Seen:
    """What these clients see, from now on."""
    seen = Seen()

    async def all_at_once() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            await asyncio.gather(*of_client(client, time.monotonic(), seen))

    asyncio.run(all_at_once())
    return seen


def sporadic(server: Server) -> Seen:
    """A client that pauses between two answers: steps of streams without a pause take half as long."""

    async def one_after_the_other(client: httpx.AsyncClient, began: float, seen: Seen) -> None:
        number = 0
        while time.monotonic() - began < MEASURED_S:
            await ask(client, began, number, MEASURED_TOKENS, seen)
            await asyncio.sleep(PAUSE_S)
            number += 1

    return asked(server, lambda *given: [one_after_the_other(*given)])


def real(server: Server, arrivals: Sequence[Arrival]) -> Seen:
    async def at_its_time(client: httpx.AsyncClient, began: float, number: int, seen: Seen) -> None:
        await asyncio.sleep(arrivals[number].at + began - time.monotonic())
        await ask(client, began, number, arrivals[number].output_tokens, seen)

    timers = [threading.Timer(at, kill, (server, what, which)) for at, what, which in KILLS]
    with looking(server) as lanes:
        for timer in timers:
            timer.start()
        seen = asked(server, lambda *given: [at_its_time(*given[:2], n, given[2]) for n in range(len(arrivals))])
    seen.lanes = lanes
    return seen


@contextmanager
def looking(server: Server) -> Iterator[list[int]]:
    """At the lanes."""
    stop, lanes = threading.Event(), []

    def look() -> None:
        due = time.monotonic() + LOOK_S
        while not stop.wait(max(0.0, due - time.monotonic())) and len(lanes) < FOR_S / LOOK_S:
            lanes.append(num_lanes(server))
            due += LOOK_S

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lanes
    finally:
        stop.set()
        thread.join()


def kill(server: Server, what: str, which: int) -> None:
    """One of the shards, or of their supervisors: groups and replicas are alike."""
    found = of_experts(server, "ray::ExpertShard" if what == "kill shard" else "ray::ServeReplica:demo")
    found[which % len(found)].kill()


def counted(server: Server, *names: str) -> np.ndarray:
    """So far, by all processes."""
    time.sleep(1.1)  # the page is kept for a second
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = [re.findall(rf"^manta_{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE) for name in names]
    return np.array([sum(map(float, values)) for values in found])


STEPS = "step_seconds_sum", "step_seconds_count"
BATCHES = "shard_busy_seconds_total", "shard_batches_total"


class Profile:
    """What the real one's batches take."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._counted = np.zeros(2)

    def measure(self, server: Server) -> None:
        before = counted(server, *BATCHES)
        seen = sporadic(server)
        assert not seen.failures
        self._num_tokens += MEASURED_TOKENS * len(seen.answers)
        self._counted += counted(server, *BATCHES) - before
        print(f"a step takes {1e3 * fmean(seen.gaps):.1f} ms")

    def costs(self, step_s: float, restart_s: float) -> tuple[EngineCosts, ShardCosts]:
        """So small a model's steps take as long for one sequence as for a few."""
        batch_s = float(self._counted[0] / self._counted[1])
        engine = EngineCosts(
            layer_s=step_s / NUM_LAYERS - batch_s, token_s=0.0, num_layers=NUM_LAYERS, top_k=TOP_K,
            num_kv_blocks=4096, max_num_seqs=64, max_model_len=1024, max_waiting=256,
        )  # fmt: skip
        shard = ShardCosts(batch_s, 0.0, load_s=max(0.1, restart_s - RESTART_S))
        print(f"{1e3 * step_s:.1f} ms a step, {1e3 * batch_s:.2f} ms a batch, a restart {restart_s:.1f} s")
        return engine, shard

    def arrivals(self) -> list[Arrival]:
        """By chance, as many as give the load of LOADS. What a token asks of a group is what the client's did."""
        busy_s = self._counted[0] / GROUPS / self._num_tokens
        chance, arrivals, begins = Random(1), list[Arrival](), 0.0
        for seconds, times in LOADS:
            a_second = times * SCALING.target_busy_fraction / busy_s / fmean(NUM_TOKENS)
            at = begins + chance.expovariate(a_second)
            while at < begins + seconds:
                tokens = chance.choice(NUM_TOKENS)
                arrivals.append(Arrival(at, f"{len(arrivals)}", PROMPT_TOKENS, tokens, timeout_s=300.0))
                at += chance.expovariate(a_second)
            begins += seconds
            print(f"{a_second:.2f} requests/s for {seconds:g} s")
        return arrivals


def restart_s(server: Server) -> float:
    """From a shard's death until its lane is back. Somebody asks meanwhile: a coordinator that is idle dials nobody."""

    def num_lanes_in_use() -> int:
        body = {"model": "demo", "prompt": [1, 2], "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        return num_lanes(server)

    began = time.monotonic()
    kill(server, "kill shard", 1)
    wait_for(lambda: num_lanes_in_use() < FEWEST, 30, "a lost lane")
    wait_for(lambda: num_lanes_in_use() == FEWEST, 120, "it to be back")
    return time.monotonic() - began


# The simulated one


class Clients(Invariants):
    """Which note what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self._answers: dict[str, Answer] = {}

    def began(self, arrival: Arrival, request: Request) -> None:
        super().began(arrival, request)
        answer = self._answers[arrival.name] = Answer(arrival.output_tokens, arrival.at)
        self.seen.answers.append(answer)

    def received(self, name: str, chunk: TokenChunk) -> None:
        super().received(name, chunk)
        if chunk.token_ids:
            self._answers[name].times.append(self._now)
            self._answers[name].num_tokens += len(chunk.token_ids)

    def ended(self, name: str, error: MantaError | None) -> None:
        super().ended(name, error)
        if error is not None:
            self.seen.failures.append(repr(error))


def simulated(engine: EngineCosts, shard: ShardCosts, arrivals: Sequence[Arrival]) -> Seen:
    spec = FleetSpec(
        groups=GROUPS, nodes=1, slots=16, experts=SCALING,
        coordinators=CoordinatorScalingConfig(min_replicas=1, max_replicas=1),
        engine=engine, shard=shard, latency_s=LATENCY_S, promises_deadlines=False,
    )  # fmt: skip
    faults = tuple(Fault(at, what, which, 0.0, 0.0) for at, what, which in KILLS)  # type: ignore[arg-type]
    clients = Clients()
    run = Run(Scenario(1, spec, tuple(arrivals), faults, gently=False, until=FOR_S), watched=False, invariants=clients)

    def look() -> None:
        coordinators = run.fleet.coordinators.values()
        clients.seen.lanes.append(sum(not lane.lost for one in coordinators for _, lane in one.lanes.all()))
        if run.queue.now < FOR_S:
            run.queue.after(LOOK_S, look)

    run.queue.at(LOOK_S, look)
    outcome = run.outcome()
    assert outcome.violation is None, outcome.violation
    return clients.seen


def test_a_fleet_is_simulated_as_it_is() -> None:
    profile = Profile()
    with running_server(CONFIG) as server:
        profile.measure(server)
        wait_for(lambda: num_lanes(server) == FEWEST, 120, "the replicas that the clients have added to be gone")
        restarted_s = restart_s(server)
        arrivals = profile.arrivals()
        before = counted(server, *STEPS)
        there = real(server, arrivals)
        step_s, steps = counted(server, *STEPS) - before
        profile.measure(server)
    here = simulated(*profile.costs(float(step_s / steps), restarted_s), arrivals)
    assert (there.failures, here.failures) == ([], [])
    told, apart = here.figures(), {}
    for name, value in there.figures().items():
        print(f"{name:34} real {value:9.2f}  simulated {told[name]:9.2f}")
        apart[name] = abs(told[name] / value - 1) if value else 0.0
    print("lanes, real     ", "".join(map(str, there.lanes)))
    print("lanes, simulated", "".join(map(str, here.lanes)))
    for name in "goodput, tokens/s", "gap, ms", "replicas, on average":
        assert apart[name] < WITHIN, name
