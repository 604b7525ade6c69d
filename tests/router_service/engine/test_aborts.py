"""Requests that end before they are answered: a thousand leave nothing, and nothing is computed for those that left."""

from __future__ import annotations

import gc
import random
import time

import pytest

from cluster.deadline import Deadline
from cluster.errors import DeadlineExceeded
from router_service.scheduling.sequence import Sequence
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory)
    return directory


def sequences() -> list[Sequence]:
    """All that this process holds."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Sequence]


def test_a_thousand_aborted_requests_leave_nothing(directory):
    """They leave while they wait, are computed in chunks, decode, or have been preempted: the cache is too small."""
    of_other_tests = sequences()
    bench = Bench(directory, num_kv_blocks=32, max_num_seqs=16, max_num_batched_tokens=96)
    engine, drawn = bench.engine, random.Random(0)
    present = []
    for number in range(1000):
        prompt = [drawn.randrange(90) for _ in range(drawn.randrange(1, 80))]
        request = make_request(prompt, max_tokens=200, ignore_eos=True, cache_salt=f"tenant {number % 5}")
        bench.add(request)
        present.append(request.key)
        if drawn.random() < 0.5:
            engine.step()
        while len(present) > 24:
            engine.abort(present.pop(drawn.randrange(len(present))))
        engine._take_pending_commands()
    assert engine.stats().preemptions_total > 0
    for key in present:
        engine.abort(key)
    engine._take_pending_commands()
    stats, blocks = engine.stats(), engine.scheduler.block_manager
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.num_kv_blocks_used) == (0, 0, 0)
    assert blocks.num_blocks == 32
    assert (engine._sequences, engine.scheduler.running, len(engine.scheduler.waiting)) == ({}, [], 0)
    assert [one for one in sequences() if one not in of_other_tests] == []
    [whole] = bench.run(make_request(range(80), max_tokens=16, ignore_eos=True))
    assert len(whole) == 16


def test_nothing_is_computed_for_those_that_left_or_whose_time_is_over(directory):
    """Both are looked for before every step, so a queue full of them costs its successors nothing."""
    bench = Bench(directory, max_num_seqs=1)
    running, last = make_request(range(10), max_tokens=3, ignore_eos=True), make_request(range(20, 27), max_tokens=1)
    late = [make_request(range(30), deadline=Deadline.after(0.2)) for _ in range(20)]
    gone = [make_request(range(40)) for _ in range(20)]
    bench.add(running, *late, *gone, last)
    bench.engine.step()
    for request in gone:
        bench.engine.abort(request.key)
    time.sleep(0.25)
    bench.engine._take_pending_commands()
    bench.run()
    assert all(isinstance(bench.errors[request.key], DeadlineExceeded) for request in late)
    assert (len(bench.token_ids(running)), len(bench.token_ids(last))) == (3, 1)
    assert bench.engine.stats().prompt_tokens_total == 10 + 7
