"""The choice among replicas as plain numbers."""

from __future__ import annotations

from collections import Counter
from random import Random

from experts_service.delivery.replica_load import BUDGET, BURST, CLEARLY, FEWEST, OVERDUE_S, SPLIT_ROWS, ReplicaLoads
from experts_service.routing_table import Replica

REPLICAS = [Replica(name, name, "test", 0, "f") for name in "abc"]


def ask(loads: ReplicaLoads, seconds: dict[str, float], times: int) -> Counter[str]:
    asked: Counter[str] = Counter()
    for _ in range(times):
        chosen = loads.choose(REPLICAS, lambda _: 0).replica_id
        loads.answered(chosen, 0, 8, seconds[chosen])
        asked[chosen] += 1
    return asked


def test_equal_replicas_are_asked_in_turn() -> None:
    asked = ask(ReplicaLoads(), {"a": 0.010, "b": 0.011, "c": 0.012}, 300)
    assert all(95 <= count <= 105 for count in asked.values()), asked


def test_a_replica_that_owes_answers_is_asked_after_the_others() -> None:
    loads = ReplicaLoads()
    assert all(loads.choose(REPLICAS, {"a": 2, "b": 0, "c": 1}.get).replica_id == "b" for _ in range(63))


def test_a_straggler_is_asked_rarely_and_returns_when_it_has_recovered() -> None:
    loads = ReplicaLoads()
    fast = dict.fromkeys("abc", 0.010)
    ask(loads, fast, 60)
    ask(loads, fast | {"a": 0.2}, 60)
    assert 0 < ask(loads, fast | {"a": 0.2}, 640)["a"] < 20
    ask(loads, fast, 640)
    assert ask(loads, fast, 300)["a"] > 90


def test_who_is_slow_is_said_as_by_one_who_looks_through_all_whoever_comes_leaves_and_gets_faster() -> None:
    """Of the fastest a bound is kept, which has to be below it whenever it is looked at."""
    chance, loads, slow = Random(3), ReplicaLoads(), 0
    names = "abcdefgh"
    speeds = dict.fromkeys(names, 0.01)
    for _ in range(60):
        replicas = tuple(Replica(name, name, "test", 0, "f") for name in chance.sample(names, chance.choice([2, 5, 8])))
        if chance.random() < 0.2:
            loads.forget({replica.replica_id for replica in replicas})
        speeds[chance.choice(names)] = chance.choice([0.005, 0.01, 0.02, 0.05])
        for _ in range(20):
            chosen = loads.choose(replicas, lambda _: 0).replica_id
            known = [loads._usual_slowness.get(replica.replica_id, 1.0) for replica in replicas]
            for replica, own in zip(replicas, known, strict=True):
                assert loads._is_slow(replica, replicas) == (own / min(known) > CLEARLY)
                slow += own / min(known) > CLEARLY
            loads.answered(chosen, 0, 8, speeds[chosen])
    assert 1000 < slow < 4000


def test_one_late_answer_does_not_make_a_straggler() -> None:
    """A new replica's first answer is late. It was then left alone for hundreds of choices, and its group no faster."""
    loads = ReplicaLoads()
    fast = dict.fromkeys("abc", 0.010)
    ask(loads, fast, 60)
    ask(loads, fast | {"a": 1.0}, 3)
    assert ask(loads, fast, 300)["a"] > 95


def test_hedges_wait_for_what_is_usual_and_have_a_budget() -> None:
    loads = ReplicaLoads()
    assert loads.patience_s(0, 8) == OVERDUE_S, "nothing is known yet"
    for _ in range(FEWEST):
        loads.answered("a", 0, 8, 0.1)
    assert 0.3 <= loads.patience_s(0, 8) < 0.31
    assert 2.4 <= loads.patience_s(0, 64) < 2.5, "of a size that is not known: longer by the rows that it has more"
    assert 0.3 <= loads.patience_s(0, 1) < 0.31
    assert loads.patience_s(1, 8) == OVERDUE_S, "another group says nothing of this one"
    for _ in range(int(BURST) + 5):
        loads.hedged()
    assert 3.0 <= loads.patience_s(0, 8) < 3.1, "beyond the budget only what is lost, as it seems"
    assert loads.patience_s(1, 8) == float("inf"), "nor what may be as slow as ever"
    for _ in range(int(1 / BUDGET) + 1):
        loads.answered("a", 0, 8, 0.1)
    assert loads.patience_s(0, 8) < 1


def test_a_replica_on_slower_hardware_is_asked_where_the_fast_one_owes_as_much_more() -> None:
    """Half of the dispatches are the slow one's at first, so it was what is usual, and got its turn for ever."""
    loads = ReplicaLoads()
    speeds = {"a": 0.002, "b": 0.04, "c": 0.04}
    ask(loads, speeds, 200)
    asked = ask(loads, speeds, 640)
    assert asked["a"] > 600
    assert asked["b"] + asked["c"] > 0, "now and then, to see whether it still is"
    busy = [loads.choose(REPLICAS, {"a": 30, "b": 0, "c": 0}.get).replica_id for _ in range(20)]
    assert set(busy) == {"b", "c"}
    assert loads.soonest(REPLICAS, lambda _: 0).replica_id == "a", "nor does a hedge go to a slow one"


def prefill(loads: ReplicaLoads, row_s: dict[str, float], rows: int) -> dict[str, int]:
    """Rows of each replica in one dispatch, which they then answer."""
    given: dict[str, int] = {}
    for replica_id, share in loads.shares(REPLICAS, rows):
        chosen = replica_id or loads.choose(REPLICAS, lambda one: given.get(one, 0)).replica_id
        given[chosen] = given.get(chosen, 0) + share
    for replica_id, share in given.items():
        loads.answered(replica_id, 0, share, 0.001 + share * row_s[replica_id])
    assert sum(given.values()) == rows
    return given


def test_many_rows_are_shared_out_by_the_rows_a_second_that_were_measured() -> None:
    """A GPU and two CPUs had a third of a prompt each, and the GPU waited."""
    loads = ReplicaLoads()
    row_s = {"a": 10e-6, "b": 100e-6, "c": 50e-6}
    for _ in range(20):
        given = prefill(loads, row_s, 2000)
    times = {replica_id: 0.001 + given[replica_id] * row_s[replica_id] for replica_id in "abc"}
    assert max(times.values()) < 1.3 * 0.001 + 2000 / sum(1 / each for each in row_s.values())
    assert given["a"] > 1400
    b, c = ((0.001 + given[one] * row_s[one]) * 3 for one in "bc")
    assert loads.patience_s(0, given["b"], "b") >= 0.9 * b, "its share is as large as it is fast: no reason for a hedge"
    assert loads.patience_s(0, given["c"], "c") >= 0.9 * c


def test_equal_replicas_have_equal_shares_and_a_few_rows_are_not_shared() -> None:
    loads = ReplicaLoads()
    row_s = {"a": 10e-6, "b": 11e-6, "c": 12e-6}
    for _ in range(20):
        assert sorted(prefill(loads, row_s, 600).values()) == [200, 200, 200]
    assert loads.shares(REPLICAS, 2 * SPLIT_ROWS - 1) == [(None, 2 * SPLIT_ROWS - 1)]
    assert [share for _, share in loads.shares(REPLICAS, 2 * SPLIT_ROWS)] == [SPLIT_ROWS, SPLIT_ROWS]


def test_a_replica_too_slow_for_a_share_gets_one_when_it_has_recovered() -> None:
    loads = ReplicaLoads()
    row_s = {"a": 10e-6, "b": 10e-6, "c": 1000e-6}
    for _ in range(10):
        given = prefill(loads, row_s, 400)
    assert "c" not in given
    row_s["c"] = 10e-6
    for _ in range(64 * 4):
        given = prefill(loads, row_s, 400)
    assert sorted(given) == ["a", "b", "c"]


def test_what_is_known_of_a_replica_goes_with_it() -> None:
    loads = ReplicaLoads()
    for _ in range(20):
        prefill(loads, {"a": 10e-6, "b": 100e-6, "c": 100e-6}, 2000)
    assert None not in dict(loads.shares(REPLICAS, 2000))
    loads.forget(set())
    assert [replica_id for replica_id, _ in loads.shares(REPLICAS, 2000)] == [None] * 3
