"""The choice among replicas as plain numbers."""

from __future__ import annotations

from collections import Counter

from experts_service.delivery.replica_load import BUDGET, BURST, FEWEST, OVERDUE_S, ReplicaLoads
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
