"""Shards' actors are found before anybody needs them; nobody waits longer than it wants for a GCS that stands still."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from experts_service.routing_table import Deployment
from experts_service.shard_handles import NoHandle, ShardHandles
from tests.experts_service.played_gcs import PlayedGcs, no_search_runs, played_gcs
from tests.experts_service.replicas import DEPLOYMENT, replica, table
from tests.waiting import wait_for

OTHERS = Deployment("another", "expert-0")
SOON_S = 10.0  # on a busy machine


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGcs]:
    with played_gcs(monkeypatch) as played:
        yield played


def found(handles: ShardHandles, name: str) -> None:
    wait_for(lambda: not handles.is_awaited(replica(name)), SOON_S, f"the handle of {name}")


def test_who_is_published_is_found_and_called_before_anybody_asks(gcs: PlayedGcs) -> None:
    """Its first call asks the GCS where it lives; without one, the first rows hung though the name was known."""
    routes = table("a")
    handles = ShardHandles(routes, [DEPLOYMENT])
    found(handles, "a")
    routes.publish(DEPLOYMENT, [replica("a"), replica("b")])
    routes.publish(OTHERS, [replica("of-another-model")])
    found(handles, "b")
    wait_for(lambda: gcs.called == ["shard-a", "shard-b"], SOON_S, "the first calls")
    gcs.stop()
    assert [handles.get(replica(name), 0.0).name for name in "ab"] == ["shard-a", "shard-b"]
    assert gcs.asked == ["shard-a", "shard-b"], "each once"


def test_nobody_waits_longer_than_its_deadline_for_a_gcs_that_stands_still(gcs: PlayedGcs) -> None:
    """It was waited for a minute."""
    gcs.stop()
    handles = ShardHandles(table("a", "b"), [DEPLOYMENT])
    for timeout_s in (0.0, 0.2):
        began = time.monotonic()
        with pytest.raises(NoHandle, match="the actor shard-b has not been found yet"):
            handles.get(replica("b"), timeout_s)
        assert time.monotonic() - began < timeout_s + 5.0
    assert handles.is_awaited(replica("a"))
    gcs.goes_on.set()
    assert handles.get(replica("b"), SOON_S).name == "shard-b"
    assert gcs.asked == ["shard-a", "shard-b"]


def test_who_asks_first_waits_for_the_search(gcs: PlayedGcs) -> None:
    handles = ShardHandles(table(), [DEPLOYMENT])
    assert handles.get(replica("new"), SOON_S).name == "shard-new"


def test_an_actor_that_is_not_there_is_looked_for_again_by_who_asks_again(gcs: PlayedGcs) -> None:
    gcs.unknown.add("shard-a")
    handles = ShardHandles(table("a", "b"), [DEPLOYMENT])
    found(handles, "b")
    assert not handles.is_awaited(replica("a")), "it is known not to be there"
    with pytest.raises(NoHandle, match=r"the actor shard-a was not found \(ValueError\)"):
        handles.get(replica("a"), SOON_S)
    gcs.stop()
    with pytest.raises(NoHandle, match=r"was not found \(ValueError\)"):  # what is known of it so far
        handles.get(replica("a"), 0.0)
    gcs.unknown.clear()
    gcs.goes_on.set()
    assert handles.get(replica("a"), SOON_S).name == "shard-a"


def test_the_handle_of_a_dead_actor_is_forgotten_and_its_name_looked_up(gcs: PlayedGcs) -> None:
    handles = ShardHandles(table("a"), [DEPLOYMENT])
    first = handles.get(replica("a"), SOON_S)
    gcs.stop()
    handles.forget(replica("a"))
    assert handles.is_awaited(replica("a"))
    gcs.goes_on.set()
    second = handles.get(replica("a"), SOON_S)
    assert second is not first
    gcs.unknown.add("shard-a")
    handles.forget(replica("a"))
    with pytest.raises(NoHandle, match="ValueError"):
        handles.get(replica("a"), SOON_S)


def test_a_replica_that_left_is_forgotten(gcs: PlayedGcs) -> None:
    routes = table("a", "b")
    handles = ShardHandles(routes, [DEPLOYMENT])
    found(handles, "b")
    routes.publish(DEPLOYMENT, [replica("b")])
    gcs.stop()
    with pytest.raises(NoHandle):
        handles.get(replica("a"), 0.0)
    assert handles.get(replica("b"), 0.0).name == "shard-b"


def test_one_that_is_closed_looks_up_nothing_more_and_lets_go(gcs: PlayedGcs) -> None:
    routes = table("a")
    gcs.stop()
    handles = ShardHandles(routes, [DEPLOYMENT])
    wait_for(lambda: gcs.asked, SOON_S, "the search")
    handles.close()
    handles.close()
    gcs.goes_on.set()
    routes.publish(DEPLOYMENT, [replica("a"), replica("b")])
    wait_for(no_search_runs, SOON_S, "the end of the search")
    began = time.monotonic()
    for name in "ab":
        with pytest.raises(NoHandle):
            handles.get(replica(name), SOON_S)
    assert time.monotonic() - began < SOON_S / 2
    assert gcs.asked == ["shard-a"]
