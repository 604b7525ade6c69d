"""A grammar that is slow to follow: its own sequence waits, all others go on, and past a bound it is refused."""

from __future__ import annotations

import threading
import time

import numpy
import pytest
import xgrammar

from cluster.errors import InvalidRequest
from router_service.grammar.grammar import GrammarState
from router_service.grammar.workers import _NUM_THREADS, GrammarWorkers
from tests.router_service.conftest import VOCABULARY
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.router_service.schemas import WEATHER, as_schema

LONG_S = 60.0


@pytest.fixture
def bench(directory):
    return Bench(directory)


@pytest.fixture
def workers():
    workers = GrammarWorkers(token_timeout_s=1.0)
    yield workers
    workers.close()


class Held:
    """xgrammar's matcher, at work on a token until `go_on` is set."""

    def __init__(self, matcher):
        self._matcher = matcher
        self.go_on = threading.Event()
        self.num_accepted = 0

    def __getattr__(self, name):
        return getattr(self._matcher, name)

    def accept_token(self, token_id):
        assert self.go_on.wait(LONG_S)
        self.num_accepted += 1
        return self._matcher.accept_token(token_id)


def constrained(seed=0, **fields):
    return make_request(
        range(5, 30), grammar=as_schema(WEATHER), temperature=1.0, seed=seed, **{"max_tokens": 30, **fields}
    )


def test_a_sequence_whose_grammar_is_late_gets_no_token_and_all_others_do(bench):
    """The engine's thread did the grammar's work: one schema took a second a token from everybody."""
    [expected] = bench.run(constrained())
    plain = [make_request(range(5 + i, 40), max_tokens=20, ignore_eos=True) for i in range(3)]
    expected_plain = bench.one_by_one(
        *(make_request(range(5 + i, 40), max_tokens=20, ignore_eos=True) for i in range(3))
    )
    slow = constrained()
    bench.add(slow, *plain)
    state = bench.engine._sequences[slow.key].grammar
    held = state._matcher = Held(state._matcher)
    for _ in range(12):
        bench.engine.step()
    assert len(bench.token_ids(slow)) == 1, "the first was known before the request came"
    assert [len(bench.token_ids(request)) for request in plain] == [12, 12, 12]
    held.go_on.set()
    bench.run()
    assert bench.token_ids(slow) == expected, "a step without a token changes none"
    assert [bench.token_ids(request) for request in plain] == expected_plain


def test_a_late_grammar_costs_no_steps(bench):
    """Until its worker was done the model computed the same token, as fast as it could, for nothing."""
    [expected] = bench.run(constrained())
    slow = constrained()
    bench.add(slow)
    state = bench.engine._sequences[slow.key].grammar
    held = state._matcher = Held(state._matcher)
    before = bench.engine.stats().steps_total
    for _ in range(12):
        bench.engine.step()
    assert bench.engine.stats().steps_total == before + 2, "one with a token, one too early"
    started, cpu = time.monotonic(), time.thread_time()
    for _ in range(20):  # as its thread does
        bench.engine._take_commands()
        bench.engine.step()
    assert time.thread_time() - cpu < 0.7 * (time.monotonic() - started), "it sleeps meanwhile"
    held.go_on.set()
    bench.run()
    assert bench.token_ids(slow) == expected


def test_work_for_a_sequence_that_has_left_is_not_begun(bench, workers):
    blocker = threading.Event()
    workers._quick.submit("", lambda: blocker.wait(LONG_S))
    request = constrained()
    bench.add(request)
    state = bench.engine._sequences[request.key].grammar
    state._workers, held = workers, Held(state._matcher)
    state._matcher = held
    held.go_on.set()
    bench.engine.step()
    bench.engine._abort(request.key)
    assert bench.engine.stats().num_kv_blocks_used == 0
    blocker.set()
    workers._quick.submit("", int).result(LONG_S)
    assert held.num_accepted == 0


def test_tenants_take_turns(bench, workers):
    """All tokens stood in one line: who had a hundred sequences delayed everybody's by a hundred of theirs."""
    bench.grammar_state(request := constrained())
    compiled, blocker, done = bench.grammars[request.grammar], threading.Event(), []
    for _ in range(_NUM_THREADS):
        workers.submit(compiled, "", lambda: blocker.wait(LONG_S))
    work = [(tenant, number) for tenant in ("many", "few") for number in range(50 if tenant == "many" else 2)]
    futures = [workers.submit(compiled, one[0], lambda one=one: done.append(one)) for one in work]
    blocker.set()
    for future in futures:
        future.result(LONG_S)
    assert max(done.index(("few", number)) for number in range(2)) <= 3 + _NUM_THREADS


def test_past_the_bound_a_request_fails_and_names_its_schema(bench, workers):
    workers.token_timeout_s = 1e-9
    slow, fine = constrained(), constrained(seed=1)
    bench.add(fine)
    bench.engine._sequences[fine.key].grammar.is_ready(LONG_S)
    bench.add(slow)
    bench.engine._sequences[slow.key].grammar._workers = workers
    bench.run()
    error = bench.errors[slow.key]
    assert isinstance(error, InvalidRequest)
    assert error.param == "response_format.json_schema.schema"
    assert "takes too long to follow" in error.message
    assert bench.chunks[fine.key][-1].finish_reason in ("stop", "length")
    assert bench.engine.stats().num_kv_blocks_used == 0


def test_a_grammar_that_was_slow_once_delays_only_slow_ones(bench, workers):
    """For all choices of a request and all later ones: they share what was compiled."""
    hostile, fine = constrained(), make_request(range(5, 30), grammar=as_schema({"type": "string"}))
    bench.grammar_state(hostile)
    compiled = bench.grammars[hostile.grammar]
    workers.note_cost(compiled, seconds=0.5)
    slow = GrammarState(compiled, hostile, workers)
    held = slow._matcher = Held(slow._matcher)
    bench.grammar_state(fine)
    quick = GrammarState(bench.grammars[fine.grammar], fine, workers)
    for state in (slow, quick):
        state.accept(int(numpy.unpackbits(state.mask, bitorder="little").argmax()))
    assert quick.is_ready(LONG_S)
    assert not slow.is_ready()
    held.go_on.set()
    assert slow.is_ready(LONG_S)


def test_xgrammar_gives_the_interpreter_free_while_it_works(bench):
    """All of this rests on it: a thread that kept the interpreter would hold up the step all the same."""
    ambiguous = 'root ::= s\ns ::= s s | "a" | s s s | ""\n'
    compiled = xgrammar.GrammarCompiler(bench.vocabulary.tokenizer_info()).compile_grammar(ambiguous)
    bitmask = xgrammar.allocate_token_bitmask(1, VOCABULARY)

    def gives_free(length):
        matcher = xgrammar.GrammarMatcher(compiled)
        accept, fill = (lambda: matcher.accept_string("a" * length)), (lambda: matcher.fill_next_token_bitmask(bitmask))
        return turns_beside(accept) > 3 and max(turns_beside(fill) for _ in range(9)) > 3

    assert any(map(gives_free, (90, 90, 180))), "the last is a second's work on the fastest machine"


def turns_beside(work):
    """How often this thread had its turn while another did some work."""
    thread, num_turns = threading.Thread(target=work), 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        num_turns += 1
    return num_turns
