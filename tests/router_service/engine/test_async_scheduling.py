"""An engine that makes the next step before it has read the last one's tokens: nobody gets anything else for it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ExpertUnavailable, StepFailed, Unavailable
from tests.router_service.engine.test_engine import prompt
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.router_service.schemas import BOUNDED, as_schema

AHEAD = {"async_scheduling": "on"}


class Watched:
    """A bench whose launched steps are remembered, and what was under way as each began."""

    def __init__(self, directory, **config):
        self.bench = Bench(directory, **AHEAD, **config)
        self.engine = self.bench.engine
        self.was_ahead = []
        launch = self.engine._launch

        def watched(batch):
            self.was_ahead.append(any(one.sequence.pending_row is not None for one in batch))
            return launch(batch)

        self.engine._launch = watched


def test_steps_that_only_decode_are_launched_before_the_last_is_read(directory):
    watched = Watched(directory)
    [tokens] = watched.bench.run(asked := make_request(prompt(20), max_tokens=6, ignore_eos=True))
    assert watched.was_ahead == [False, False, True, True, True, True], "a prompt, then tokens; nothing too many"
    assert Bench(directory).run(make_request(prompt(20), max_tokens=6, ignore_eos=True)) == [tokens]
    assert [chunk.first_position for chunk in watched.bench.chunks[asked.key]] == list(range(6))


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"routed_experts": True},
        {"grammar": as_schema(BOUNDED["weather"])},
    ],
)
@pytest.mark.usefixtures("no_grammar_is_late")
def test_who_needs_each_token_at_once_has_it_and_so_do_those_beside(directory, asked):
    watched = Watched(directory)
    watched.bench.run(make_request(prompt(5), max_tokens=6, **asked), make_request(prompt(9), max_tokens=6))
    assert not any(watched.was_ahead)


def test_who_ends_with_a_token_gets_no_other_and_leaves_nothing_of_the_surplus(directory):
    """The step after it had been launched already. Its key and value lie in a block that nobody can share."""
    free = Bench(directory).run(make_request(prompt(30), max_tokens=9, ignore_eos=True))[0]
    last = next(token for token in free[3:] if token not in free[:3])
    place = free.index(last)
    watched = Watched(directory, block_size=1, num_kv_blocks=600)
    engine = watched.engine
    request = make_request(prompt(30), max_tokens=99, stop_token_ids=(last,), ignore_eos=True)
    assert watched.bench.run(request) == [free[: place + 1]]
    assert watched.was_ahead[-1], "one more was computed"
    chunks = watched.bench.chunks[request.key]
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * (place + 1)
    assert (chunks[-1].finish_reason, chunks[-1].stop_token_id) == ("stop", last)
    stats = engine.stats()
    assert (stats.generation_tokens_total, stats.prompt_tokens_total) == (place + 1, 30)
    assert (stats.num_kv_blocks_used, stats.num_requests_running) == (0, 0)
    engine.scheduler.check(())
    again = make_request([*prompt(30), *free[: place + 1], 5, 6], max_tokens=1)
    watched.bench.run(again)
    assert watched.bench.chunks[again.key][0].num_cached_tokens == 30 + place, "all that was told but the last token"


def test_who_leaves_while_a_step_is_under_way_is_told_nothing_more(directory):
    watched = Watched(directory)
    leaving, staying = (make_request(prompt(9, seed), max_tokens=12, ignore_eos=True) for seed in (1, 2))
    watched.bench.add(leaving, staying)
    for _ in range(4):
        watched.engine.step()
    assert watched.engine._under_way is not None
    had = len(watched.bench.chunks[leaving.key])
    watched.engine.abort(leaving.key)
    watched.engine._take_pending_commands()
    watched.bench.run()
    assert len(watched.bench.chunks[leaving.key]) == had
    alone = Bench(directory).run(make_request(prompt(9, 2), max_tokens=12, ignore_eos=True))
    assert [watched.bench.token_ids(staying)] == alone
    watched.engine.scheduler.check(())


@pytest.mark.parametrize("error", [ExpertUnavailable("no answer", group=1), RuntimeError("injected")])
def test_what_a_launched_step_raises_comes_after_the_tokens_of_the_one_before(directory, monkeypatch, error):
    watched = Watched(directory)
    request = make_request(prompt(9), max_tokens=12, ignore_eos=True)
    watched.bench.add(request)
    for _ in range(4):
        watched.engine.step()
    had = len(watched.bench.chunks[request.key])

    def forward(batch):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(watched.engine.model_runner, "forward", forward)
        watched.engine.step()
    assert len(watched.bench.chunks[request.key]) == had + 1
    told = watched.bench.errors[request.key]
    assert isinstance(told, ExpertUnavailable if isinstance(error, ExpertUnavailable) else StepFailed)
    assert watched.engine.stats().num_kv_blocks_used == 0


def test_what_a_device_raises_late_ends_those_of_its_step(directory, monkeypatch):
    """It is told where tokens are waited for, when the step after has been launched."""
    watched = Watched(directory)
    engine = watched.engine
    watched.bench.add(request := make_request(prompt(9), max_tokens=12, ignore_eos=True))
    for _ in range(3):
        engine.step()

    def wait():
        raise RuntimeError("injected")

    monkeypatch.setattr(engine._under_way.tokens, "wait", wait)
    engine.step()
    assert isinstance(watched.bench.errors[request.key], StepFailed)
    assert engine._under_way is None
    later = make_request(prompt(9), max_tokens=3)
    assert watched.bench.run(later) == Bench(directory).run(make_request(prompt(9), max_tokens=3))
    engine.scheduler.check(())


@pytest.mark.parametrize("late", [False, True], ids=["when it is launched", "when it is waited for"])
def test_what_a_step_raises_after_all_its_sequences_have_left_is_logged(directory, monkeypatch, caplog, late):
    """It was counted and nothing else, or not even that: what a device says of itself was never seen."""
    watched = Watched(directory)
    engine = watched.engine
    watched.bench.add(leaving := make_request(prompt(9), max_tokens=12, ignore_eos=True))
    for _ in range(3):
        engine.step()
    error = RuntimeError("injected")
    if late:
        monkeypatch.setattr(engine._under_way.tokens, "wait", lambda: raise_(error))
    else:
        engine._under_way.tokens, engine._under_way.error = None, error
    engine.abort(leaving.key)
    engine._take_pending_commands()
    with caplog.at_level(logging.ERROR):
        engine.step()
    ours = [record for record in caplog.records if record.name == "router_service.engine"]
    assert [(record.message, record.exc_info[1]) for record in ours] == [
        ("a step failed for nobody, as all its sequences had ended: RuntimeError('injected')", error)
    ]
    assert engine.stats().failed_steps_total == 1
    assert leaving.key not in watched.bench.errors
    engine.scheduler.check(())


def raise_(error):
    raise error


def test_values_that_are_not_finite_are_seen_late_and_shared_with_nobody(directory, monkeypatch):
    watched = Watched(directory, block_size=1, num_kv_blocks=600)
    engine = watched.engine
    watched.bench.add(request := make_request(prompt(9), max_tokens=12, ignore_eos=True))
    for _ in range(3):
        engine.step()
    decoder = engine.model_runner.decoder
    real = decoder.logits
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "logits", lambda hidden: real(hidden).fill_(float("nan")))
        engine.step()  # launched; what is read is the one before
    had = watched.bench.token_ids(request)
    assert not watched.bench.errors
    watched.bench.run()
    assert isinstance(watched.bench.errors[request.key], Unavailable)
    assert watched.bench.token_ids(request) == had
    again = make_request([*prompt(9), *had, 5], max_tokens=1)
    watched.bench.run(again)
    assert watched.bench.chunks[again.key][0].num_cached_tokens == 0


def test_where_memory_is_short_the_newest_goes_and_the_others_go_on(directory, monkeypatch):
    watched = Watched(directory)
    older, newer = (make_request(prompt(9, seed), max_tokens=12, ignore_eos=True) for seed in (1, 2))
    watched.bench.add(older, newer)
    for _ in range(4):
        watched.engine.step()

    def forward(batch):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(watched.engine.model_runner, "forward", forward)
        watched.engine.step()
    watched.bench.run()
    assert list(watched.bench.errors) == [newer.key]
    alone = Bench(directory).run(make_request(prompt(9, 1), max_tokens=12, ignore_eos=True))
    assert [watched.bench.token_ids(older)] == alone


def test_where_memory_is_short_while_tokens_are_read_all_of_the_step_end(directory, monkeypatch):
    """The older went on without the token of this step, and was in none after the next: it waited for its deadline."""
    watched = Watched(directory)
    asked = [make_request(prompt(9, seed), max_tokens=12, ignore_eos=True) for seed in (1, 2)]
    watched.bench.add(*asked)
    for _ in range(4):
        watched.engine.step()
    monkeypatch.setattr(watched.engine._under_way.tokens, "wait", lambda: raise_(MemoryError()))
    for _ in range(20):
        watched.engine.step()
    assert not watched.engine._sequences
    assert watched.bench.errors.keys() == {request.key for request in asked}
    for request in asked:
        assert isinstance(watched.bench.errors[request.key], StepFailed)
        had = watched.bench.token_ids(request)
        assert [had] == Bench(directory).run(replace(request, sampling=replace(request.sampling, max_tokens=len(had))))
    watched.engine.scheduler.check(())


WAYS = st.sampled_from(
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_p": 0.8, "logprobs": 2},
        {"temperature": 1.0, "min_tokens": 5},
        {"temperature": 1.0, "ignore_eos": True},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"prompt_logprobs": 1},
        {"temperature": 1.0, "stop_token_ids": tuple(range(2, 60))},
    ]
)
ASKED = st.tuples(WAYS, st.integers(1, 50), st.integers(1, 14), st.sampled_from(["", "other"]))


@given(
    st.lists(ASKED, min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=3),  # after which step who leaves
    st.sampled_from(
        [{}, {"num_kv_blocks": 34}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 17, "microbatches": 2}]
    ),
)
@settings(max_examples=25, deadline=None)
def test_the_same_tokens_whoever_comes_leaves_or_is_preempted(directory, asked, leaving, config):
    def requests():
        return [
            make_request(prompt(length, i), request_id=f"{i}", seed=i, max_tokens=tokens, cache_salt=salt, **way)
            for i, (way, length, tokens, salt) in enumerate(asked)
        ]

    def chunks(**mode):
        bench = Bench(directory, block_size=2, max_model_len=66, **{"num_kv_blocks": 200, **config}, **mode)
        first, later = requests()[::2], requests()[1::2]
        bench.add(*first)
        gone = set()
        for number in range(13):
            bench.engine.step()
            if number == 2:
                bench.add(*later)
            for _, who in (one for one in leaving if one[0] == number and mode):
                bench.engine.abort((f"{who}", 0))
                gone.add((f"{who}", 0))
            bench.engine._take_pending_commands()
        bench.run()
        assert not bench.errors
        bench.engine.scheduler.check(())
        assert bench.engine.stats().num_kv_blocks_used == 0
        return gone, bench.chunks

    _, expected = chunks()
    gone, found = chunks(**AHEAD)
    for request in requests():
        theirs, ours = found[request.key], expected[request.key]
        if request.key in gone:
            ours = ours[: len(theirs)]
        assert [tell(chunk) for chunk in theirs] == [tell(chunk) for chunk in ours]


def tell(chunk):
    logprobs = chunk.logprobs and [[token for token, _ in one.top] for one in chunk.logprobs]
    return chunk.first_position, chunk.token_ids, chunk.finish_reason, chunk.stop_token_id, logprobs
