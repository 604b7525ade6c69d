"""The routing table without Ray: epochs, suspicion, waiting."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ExpertUnavailable
from experts_service.routing_table import Deployment, RoutingTable
from tests.experts_service.replicas import DEPLOYMENT, replica, table


def chosen(table: RoutingTable, times: int = 6) -> set[str]:
    choices = [table.choose(DEPLOYMENT) for _ in range(times)]
    return {choice[0].replica_id for choice in choices if choice is not None}


def test_trusted_replicas_take_turns_and_a_suspected_one_is_the_last_resort() -> None:
    routes = table("a", "b")
    assert chosen(routes) == {"a", "b"}
    routes.suspect(DEPLOYMENT, "a", routes.epoch)
    assert chosen(routes) == {"b"}
    routes.suspect(DEPLOYMENT, "b", routes.epoch)
    assert chosen(routes) == {"a", "b"}
    routes.trust(DEPLOYMENT, "a")
    assert chosen(routes) == {"a"}


def test_bad_news_of_an_earlier_incarnation_is_ignored() -> None:
    routes = table("a")
    sent_at = routes.epoch
    routes.suspect(DEPLOYMENT, "a", sent_at)
    routes.trust(DEPLOYMENT, "a")  # a new shard
    now = routes.epoch
    routes.suspect(DEPLOYMENT, "a", sent_at)  # a second call to the old one fails late
    assert routes.epoch == now
    assert [r.suspected for r in routes.replicas(DEPLOYMENT)] == [False]
    routes.suspect(DEPLOYMENT, "a", now)
    assert [r.suspected for r in routes.replicas(DEPLOYMENT)] == [True]


def test_publishing_keeps_what_is_known_of_replicas_that_stay() -> None:
    routes = table("a", "b")
    routes.suspect(DEPLOYMENT, "b", routes.epoch)
    routes.publish(DEPLOYMENT, [replica("b"), replica("c")])
    assert {r.replica_id: r.suspected for r in routes.replicas(DEPLOYMENT)} == {"b": True, "c": False}
    routes.publish(DEPLOYMENT, [])
    assert routes.choose(DEPLOYMENT) is None


def test_replicas_of_several_tiers_stand_together_and_the_last_tier_is_kept() -> None:
    """When all replicas of one tier are gone the other serves on; when nobody is left, the last ones are asked."""
    routes = RoutingTable()

    def publish(tier: str, *names: str) -> set[str]:
        routes.publish_tier(DEPLOYMENT, tier, [replace(replica(name), tier=tier) for name in names])
        return {one.replica_id for one in routes.replicas(DEPLOYMENT)}

    assert publish("expert-0-tier1") == set()
    assert publish("expert-0", "a") == {"a"}
    assert publish("expert-0-tier1", "b", "c") == {"a", "b", "c"}
    assert publish("expert-0-tier1", "c") == {"a", "c"}
    assert publish("expert-0") == {"c"}
    assert publish("expert-0-tier1") == {"c"}
    assert publish("expert-0", "d") == {"c", "d"}
    assert publish("expert-0-tier1") == {"d"}


def test_waiting_ends_when_every_deployment_has_a_replica_and_names_those_without() -> None:
    routes = table("a")
    other = Deployment("model", "expert-1")
    with pytest.raises(ExpertUnavailable, match=r"no replica of expert-1 was ready within 0.05 s"):
        routes.wait_for([DEPLOYMENT, other], 0.05)
    late = threading.Timer(0.05, lambda: routes.publish(other, [replica("x")]))
    late.start()
    started = time.monotonic()
    routes.wait_for([DEPLOYMENT, other], 30.0)
    assert time.monotonic() - started < 10
    late.join()


def test_a_listener_hears_every_change_until_it_is_ended() -> None:
    routes = table("a")
    heard: list[int] = []
    stop = routes.listen(lambda: heard.append(routes.epoch))
    routes.suspect(DEPLOYMENT, "a", routes.epoch)
    routes.suspect(DEPLOYMENT, "a", routes.epoch)  # no change
    routes.trust(DEPLOYMENT, "a")
    stop()
    routes.publish(DEPLOYMENT, [])
    assert heard == [2, 3]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sets(st.sampled_from("abc"))),
        st.tuples(st.just("suspect"), st.sampled_from("abc")),
        st.tuples(st.just("trust"), st.sampled_from("abc")),
    )
)


@given(STEPS)
def test_whatever_happens_a_listed_replica_is_chosen_and_epochs_only_rise(steps: list[tuple[str, object]]) -> None:
    routes = RoutingTable()
    listed: set[str] = set()
    for verb, what in steps:
        before = routes.epoch
        if verb == "publish":
            assert isinstance(what, set)
            listed = what
            routes.publish(DEPLOYMENT, [replica(name) for name in what])
        elif verb == "suspect":
            routes.suspect(DEPLOYMENT, str(what), before)
        else:
            routes.trust(DEPLOYMENT, str(what))
        assert routes.epoch >= before
        assert {r.replica_id for r in routes.replicas(DEPLOYMENT)} == listed
        assert all(r.epoch <= routes.epoch for r in routes.replicas(DEPLOYMENT))
        choice = routes.choose(DEPLOYMENT)
        assert (choice is None) if not listed else (choice is not None and choice[0].replica_id in listed)
