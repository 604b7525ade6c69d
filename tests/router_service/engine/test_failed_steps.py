"""A fault at every call of a step: it ends whose fault it is, or the sequences of that step, and nobody else.

Four sequences run (one of them has just come), one waits, and one call of their next step raises. Once, an exception
that nobody had foreseen killed the engine, and with it every sequence, also those that only waited.
"""

from __future__ import annotations

import importlib
import random
import threading
from types import SimpleNamespace

import pytest
import torch

from cluster.errors import EngineDead, ExpertUnavailable, InvalidRequest, StepFailed, Unavailable
from router_service.grammar.grammar import GrammarState
from router_service.outputs.routed_experts import RoutedExperts
from tests.router_service.conftest import VOCABULARY
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.router_service.schemas import BOUNDED, as_schema
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("no_grammar_is_late")

RUNNING = ("greedy", "shaped", "grammar", "newcomer")  # all in the step that fails; the last one came last


def prompt(length, seed):
    return random.Random(seed).choices(range(3, 300), k=length)


def requests():
    shaped = {"temperature": 1.0, "repetition_penalty": 1.2, "logprobs": 2, "logit_bias": ((7, 2.0),)}
    return {
        "greedy": make_request(prompt(20, 1), ignore_eos=True, routed_experts=True),
        "shaped": make_request(prompt(30, 2), ignore_eos=True, seed=5, **shaped),
        "grammar": make_request(prompt(9, 3), max_tokens=40, temperature=1.0, grammar=as_schema(BOUNDED["weather"])),
        "newcomer": make_request(prompt(40, 4), ignore_eos=True, prompt_logprobs=1),
        "waiting": make_request(prompt(12, 5), ignore_eos=True),
        "embedded": make_request(prompt(25, 6), pooling="mean"),
        "later": make_request(prompt(20, 1), ignore_eos=True),
    }


@pytest.fixture(scope="module")
def alone(directory):
    """What each gets when nothing fails."""
    bench = Bench(directory)
    asked = requests()
    return {name: bench.run(request)[0] for name, request in asked.items()}


class Fault:
    """Makes a call raise once, before or after it does its work; for one sequence where it is given the key."""

    def __init__(self, monkeypatch, owner, name, *, after=False, key=None, error=None, always=False):
        real = getattr(owner, name)
        self.raised = 0
        error = error or RuntimeError("injected")

        def call(*arguments, **named):
            concerned = key is None or any(key in _keys(argument) for argument in arguments)
            if not concerned or (self.raised and not always):
                return real(*arguments, **named)
            if after:
                real(*arguments, **named)
            self.raised += 1
            raise error

        monkeypatch.setattr(owner, name, call)


def _keys(argument):
    """Of the sequences in an argument of a call."""
    if isinstance(argument, list | tuple):
        return [key for item in argument for key in _keys(item)]
    request = getattr(argument, "request", None)
    return [] if request is None else [request.key]


class Scene:
    """The engine right before the step that fails."""

    def __init__(self, directory, **config):
        self.asked = requests()
        self.bench = Bench(directory, max_num_seqs=4, block_size=4, num_kv_blocks=256, **config)
        self.engine = self.bench.engine
        self.bench.add(*(self.asked[name] for name in RUNNING[:-1]))
        for _ in range(4):
            self.engine.step()
        self.bench.add(self.asked["newcomer"], self.asked["waiting"])
        self.names = {request.key: name for name, request in self.asked.items()}

    def key(self, name):
        return self.asked[name].key

    def fails(self, expected, alone):
        """Run to the end: those fail, all others get their tokens, and so does one who comes later."""
        bench, engine = self.bench, self.engine
        bench.run()
        assert {self.names[key] for key in bench.errors} == set(expected)
        for error in bench.errors.values():
            assert isinstance(error, StepFailed)
            assert error.__traceback__ is None
            assert "injected" not in str(error), "what was raised may hold anything"
        bench.run(self.asked["later"])
        for name in {"later", "waiting", *RUNNING} - set(expected):
            assert bench.token_ids(self.asked[name]) == alone[name], name
        for name in expected:
            tokens = bench.token_ids(self.asked[name])
            assert tokens == alone[name][: len(tokens)], name
        assert engine.stats().num_kv_blocks_used == 0
        engine.scheduler.check(())


def in_forward(scene):
    runner = scene.engine.model_runner
    decoder = runner.decoder
    return {
        "forward": (runner, "forward"),
        "plan": (runner.attention, "plan"),
        "attend": (decoder, "_attend"),
        "dispatch": (decoder.dispatcher, "dispatch"),
        "send": (decoder.dispatcher._transport, "send"),
        "combine": (decoder.dispatcher, "combine"),
        "routed": (RoutedExperts, "tell"),
        "hidden": (decoder, "hidden_states"),
        "logits": (decoder, "logits"),
    }


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "call",
    ["forward", "plan", "attend", "dispatch", "send", "combine", "routed", "hidden", "logits"],
)
def test_what_the_model_raises_ends_the_sequences_of_that_step(
    directory, alone, monkeypatch, call, after, microbatches
):
    scene = Scene(directory, microbatches=microbatches)
    fault = Fault(monkeypatch, *in_forward(scene)[call], after=after)
    scene.fails(RUNNING, alone)
    assert fault.raised == 1


@pytest.mark.parametrize("name", ["score_prompts", "pool_prompts", "AttentionMetadata", "RoutedExperts"])
def test_so_does_what_is_made_of_the_hidden_states(directory, alone, monkeypatch, name):
    scene = Scene(directory)
    Fault(monkeypatch, importlib.import_module("router_service.model.model_runner"), name)
    scene.fails(RUNNING, alone)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("call", "victim"),
    [
        ("grow", "greedy"),
        ("grow", "shaped"),
        ("grow", "newcomer"),
        ("take_prefix", "newcomer"),
        ("publish", "shaped"),
        ("publish", "newcomer"),
    ],
)
def test_blocks_that_cannot_be_had_or_published_end_one_sequence(directory, alone, monkeypatch, call, victim, after):
    scene = Scene(directory)
    fault = Fault(monkeypatch, scene.engine.scheduler.block_manager, call, after=after, key=scene.key(victim))
    scene.fails({victim}, alone)
    assert fault.raised == 1


def test_sampling_that_fails_for_all_is_tried_one_by_one(directory, alone, monkeypatch):
    scene = Scene(directory)
    fault = Fault(monkeypatch, scene.engine.sampler, "launch")
    scene.fails((), alone)
    assert fault.raised == 1


@pytest.mark.parametrize("victim", RUNNING)
def test_sampling_that_fails_for_one_row_ends_one_sequence(directory, alone, monkeypatch, victim):
    scene = Scene(directory)
    Fault(monkeypatch, scene.engine.sampler, "launch", key=scene.key(victim), always=True)
    scene.fails({victim}, alone)


def test_log_probabilities_end_whoever_asks_for_them(directory, alone, monkeypatch):
    scene = Scene(directory)
    Fault(monkeypatch, importlib.import_module("router_service.sampling.sampler"), "token_logprobs", always=True)
    scene.fails({"shaped"}, alone)


@pytest.mark.parametrize("call", ["accept", "is_ready", "_look"])
def test_a_grammar_ends_the_sequence_that_follows_it(directory, alone, monkeypatch, call):
    scene = Scene(directory)
    Fault(monkeypatch, GrammarState, call, always=True)
    scene.fails({"grammar"}, alone)


def test_so_does_a_grammar_that_cannot_even_be_asked(directory, alone, monkeypatch):
    scene = Scene(directory)
    monkeypatch.setattr(GrammarState, "error", property(lambda state: 1 / 0))
    scene.fails({"grammar"}, alone)


@pytest.mark.parametrize("victim", RUNNING)
def test_a_result_that_cannot_be_told_ends_its_sequence(directory, alone, monkeypatch, victim):
    scene = Scene(directory)
    Fault(monkeypatch, importlib.import_module("router_service.engine"), "_chunk", key=scene.key(victim))
    scene.fails({victim}, alone)


def test_an_embedding_that_cannot_be_made_ends_its_own_request(directory, alone, monkeypatch):
    scene = Scene(directory)
    scene.bench.run()
    Fault(monkeypatch, importlib.import_module("router_service.engine"), "embedding")
    scene.bench.add(scene.asked["embedded"])
    scene.fails({"embedded"}, alone)


def test_whoever_missed_a_token_is_ended(directory, alone, monkeypatch):
    """A step's results could not be handed to the event loop: nobody of that step may go on with a gap."""
    scene = Scene(directory)
    Fault(monkeypatch, scene.engine, "_deliver")
    scene.fails(RUNNING, alone)


def test_a_step_that_cannot_be_observed_is_taken_all_the_same(directory, alone):
    scene = Scene(directory)
    scene.engine._observe_step = lambda seconds, batch: 1 / 0
    scene.fails((), alone)


def test_what_cannot_be_queued_is_ended(directory, alone, monkeypatch):
    scene = Scene(directory)
    Fault(monkeypatch, scene.engine.scheduler, "add")
    scene.bench.add(scene.asked["embedded"])
    scene.fails({"embedded"}, alone)


def test_a_request_that_comes_twice_is_answered_once(directory, alone):
    """The second of one id was an AssertionError on the engine's thread."""
    scene = Scene(directory)
    for name in ("greedy", "newcomer", "waiting"):
        scene.bench.add(scene.asked[name])
    scene.fails((), alone)


def test_experts_that_do_not_answer_are_told_as_what_they_are(directory, monkeypatch):
    scene = Scene(directory)
    raised = ExpertUnavailable("expert group 1 did not answer", group=1)
    Fault(monkeypatch, scene.engine.model_runner.decoder.dispatcher, "combine", error=raised)
    scene.bench.run()
    assert {scene.names[key] for key in scene.bench.errors} == set(RUNNING)
    for error in scene.bench.errors.values():
        assert type(error) is ExpertUnavailable
        assert error.group == 1
        assert error is not raised
        assert error.__traceback__ is None
    assert scene.engine.stats().failed_steps_total == 1


class Recorded:
    """A transport that remembers its flights, and on which threads they were closed before they were dropped."""

    takes_device_rows = False

    def __init__(self, inner):
        self.inner = inner
        self.flights = []

    def send(self, layer, rows, parts):
        flight = self.inner.send(layer, rows, parts)
        closed = []
        self.flights.append(closed)

        def close():
            closed.append(threading.current_thread().name)
            flight.close()

        return SimpleNamespace(wait=flight.wait, close=close)  # of the experts here there is but one


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("call", ["attend", "combine", "logits"])
def test_what_is_under_way_when_a_step_fails_is_closed_by_the_thread_that_sent_it(directory, monkeypatch, call, at):
    """Else a link is told on the event loop, where the last reference is dropped, while the engine reads from it."""
    scene = Scene(directory, microbatches=3)
    owner, name = in_forward(scene)[call]
    dispatcher = scene.engine.model_runner.decoder.dispatcher
    transport = dispatcher._transport = Recorded(dispatcher._transport)
    real, calls = getattr(owner, name), []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("injected")
        return real(*arguments)

    monkeypatch.setattr(owner, name, failing)
    scene.engine.start()
    wait_for(lambda: not scene.engine._sequences, 20, "the others to end")
    scene.engine.stop()
    assert {scene.names[key] for key in scene.bench.errors} == set(RUNNING)
    assert transport.flights
    assert {tuple(closed) for closed in transport.flights} == {("engine",)}


CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to …"
OUT_OF_MEMORY = {
    "python": MemoryError,
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": lambda: RuntimeError(CPU_ALLOCATOR),
}  # made anew each time: an exception keeps the frames that it went through


@pytest.mark.parametrize("call", ["forward", "attend", "combine", "logits"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("microbatches", [1, 3])
def test_memory_that_is_short_ends_the_newest_of_the_step(directory, alone, monkeypatch, call, error, microbatches):
    scene = Scene(directory, microbatches=microbatches)
    Fault(monkeypatch, *in_forward(scene)[call], error=OUT_OF_MEMORY[error]())
    scene.fails({"newcomer"}, alone)


def test_memory_that_is_short_again_and_again_ends_one_after_the_other(directory, alone, monkeypatch):
    scene = Scene(directory)
    real = scene.engine.model_runner.forward

    def forward(batch):
        if len(batch) > 2:
            raise MemoryError
        return real(batch)

    monkeypatch.setattr(scene.engine.model_runner, "forward", forward)
    monkeypatch.setattr(scene.engine.scheduler, "max_num_seqs", 3)
    scene.engine.step()
    assert [scene.names[key] for key in scene.bench.errors] == ["grammar"]
    monkeypatch.setattr(scene.engine.scheduler, "max_num_seqs", 2)
    scene.fails({"grammar"}, alone)


def test_prompts_computed_again_after_memory_was_short_are_pooled_once(directory, monkeypatch):
    """The end of a prompt had been pooled when the step failed; it runs again, and its rows count once."""
    bench = Bench(directory)
    bench.run(expected := make_request(prompt(25, 1), pooling="mean"))
    again = Bench(directory, max_num_batched_tokens=15)
    again.add(asked := make_request(prompt(25, 1), pooling="mean"), newest := make_request(prompt(5, 9)))
    again.engine.step()
    fault = Fault(monkeypatch, again.engine.model_runner.decoder, "logits", error=MemoryError())
    again.run()
    assert fault.raised == 1
    assert list(again.errors) == [newest.key]
    torch.testing.assert_close(again.embeddings[asked.key], bench.embeddings[expected.key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [3, VOCABULARY]}, None),
        ({"prompt": [3, -1]}, None),
        ({"prompt": [3], "output": [VOCABULARY]}, None),
        ({"prompt": [3], "logit_bias": ((VOCABULARY, 1.0),)}, "logit_bias"),
        ({"prompt": [3], "stop_token_ids": (5, -2), "min_tokens": 2}, "stop_token_ids"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused_before_a_step(directory, alone, fields, param):
    """Some tokenizers know tokens that the model has no row for. On a GPU the device was lost with such an id."""
    scene = Scene(directory)
    monkey = scene.engine.__dict__
    monkey["check_alive"] = lambda: None  # steps are taken by hand
    with pytest.raises(InvalidRequest, match=f"not in the vocabulary of {VOCABULARY}") as refused:
        scene.engine.submit(make_request(**fields))
    assert refused.value.param == param
    scene.fails((), alone)


def run_thread(scene):
    """Until the engine has stopped by itself."""
    scene.engine.start()
    scene.engine._thread.join(20)
    assert not scene.engine._thread.is_alive()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda scene: scene.engine.scheduler.block_manager._free.popitem(),
        lambda scene: scene.engine.scheduler.waiting.remove(next(iter(scene.engine.scheduler.waiting))),
        lambda scene: scene.engine.scheduler.block_manager._references.__setitem__(-1, 7),
    ],
    ids=["a block is lost", "a sequence is lost", "a count is wrong"],
)
def test_blocks_and_queues_that_do_not_add_up_end_the_engine(directory, monkeypatch, break_it):
    """Nobody waits for ever; whoever was in the failed step is told so, and all others may go on elsewhere."""
    scene = Scene(directory)
    ended = []
    scene.engine._on_death = lambda: ended.append("process")
    real = scene.engine.model_runner.forward

    def forward(batch):
        real(batch)
        break_it(scene)
        raise RuntimeError("injected")

    monkeypatch.setattr(scene.engine.model_runner, "forward", forward)
    run_thread(scene)
    assert ended == ["process"]
    told = {scene.names[key]: type(error) for key, error in scene.bench.errors.items()}
    assert told == {**dict.fromkeys(RUNNING, StepFailed), "waiting": EngineDead}
    with pytest.raises(EngineDead):
        scene.engine.check_alive()
    with pytest.raises(EngineDead):
        scene.engine.submit(make_request([5]))


def test_a_device_that_is_gone_ends_the_engine(directory, monkeypatch):
    scene = Scene(directory)

    def gone(device, *, memory):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("router_service.engine.check_device", gone)
    Fault(monkeypatch, scene.engine.model_runner, "forward")
    run_thread(scene)
    told = {scene.names[key]: type(error) for key, error in scene.bench.errors.items()}
    assert told == {**dict.fromkeys(RUNNING, StepFailed), "waiting": EngineDead}


def test_memory_that_stays_exhausted_ends_the_engine_once_nothing_is_left_to_give_up(directory, monkeypatch):
    scene = Scene(directory)
    asked = []

    def check_device(device, *, memory):
        asked.append(memory)
        if memory:
            raise MemoryError

    monkeypatch.setattr("router_service.engine.check_device", check_device)
    monkeypatch.setattr(scene.engine.scheduler, "max_num_seqs", 3)
    Fault(monkeypatch, scene.engine.model_runner, "forward", error=MemoryError(), always=True)
    scene.bench.engine.scheduler.waiting.remove(scene.engine._sequences[scene.key("newcomer")])
    del scene.engine._sequences[scene.key("newcomer")]
    scene.engine.scheduler.waiting.remove(scene.engine._sequences[scene.key("waiting")])
    del scene.engine._sequences[scene.key("waiting")]
    run_thread(scene)
    assert asked == [False, False, True]
    assert [scene.names[key] for key in scene.bench.errors] == ["grammar", "shaped", "greedy"]


def test_a_request_too_large_for_the_memory_ends_alone(directory, alone, monkeypatch):
    """One sequence alone asks for too much: it fails, and the engine lives, as there is memory for others."""
    scene = Scene(directory)
    scene.bench.run()
    Fault(monkeypatch, scene.engine.model_runner, "forward", error=MemoryError())
    scene.bench.run(large := make_request(prompt(10, 8)))
    assert isinstance(scene.bench.errors.pop(large.key), StepFailed)
    scene.fails((), alone)


def test_values_that_are_not_finite_are_no_failed_step_of_ours(directory, monkeypatch):
    scene = Scene(directory)
    decoder = scene.engine.model_runner.decoder
    real = decoder.logits
    monkeypatch.setattr(decoder, "logits", lambda hidden: real(hidden).fill_(float("nan")))
    scene.engine.step()
    assert {scene.names[key] for key in scene.bench.errors} == set(RUNNING)
    assert all(type(error) is Unavailable for error in scene.bench.errors.values())
