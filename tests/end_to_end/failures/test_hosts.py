"""Three hosts, two with a replica of every group. What happens to them costs no stream a token, wrong or lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.hosts import NotPossible, hosts
from tests.ray_hosts import PORT, RayHosts, frames, ray_hosts
from tests.steady_streams import Seen, SteadyStreams
from tests.waiting import wait_for

pytestmark = pytest.mark.root

PROMPTS = [f"Question {index}: what is a good cheese?" for index in range(4)]
NUM_TOKENS = 60
LONGEST_GAP_S = 10.0  # ten times what is promised
RECOVERY_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHosts]:
    """The first host has doors and coordinator, the others the experts."""
    try:
        with hosts(3) as network, ray_hosts(network) as running, running.manta():
            yield running
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def streams(cluster: RayHosts) -> SteadyStreams:
    steady = SteadyStreams(f"http://127.0.0.1:{PORT}", "demo", PROMPTS, NUM_TOKENS)
    cluster.head.run(steady.learn)
    return steady


def seen_during(cluster: RayHosts, streams: SteadyStreams, disturb: Callable[[], None]) -> Seen:
    """What clients on the head's host see from a second before `disturb` begins until two after it has returned."""

    def look() -> Seen:
        with streams.running() as seen:
            time.sleep(1.0)
            disturb()
            time.sleep(2.0)
        return seen

    seen = cluster.head.run(look)
    print(f"{seen.num_complete} streams, longest gap {seen.longest_gap_s:.3f} s")
    return seen


def check(seen: Seen) -> None:
    assert seen.failures == []
    assert seen.num_wrong == 0
    assert seen.num_complete >= len(PROMPTS)
    assert seen.longest_gap_s < LONGEST_GAP_S


def test_replicas_of_a_group_are_on_different_hosts(cluster: RayHosts) -> None:
    for host in cluster.others:
        assert cluster.experts_on(host) == ["expert-0", "expert-1"]


def test_lost_packets(cluster: RayHosts, streams: SteadyStreams) -> None:
    lossy = cluster.others[0]

    def lose() -> None:
        lossy.lose(0.05)
        time.sleep(3)
        lossy.lose(0)

    try:
        check(seen_during(cluster, streams, lose))
    except NotPossible as reason:
        pytest.skip(f"packets cannot be dropped: {reason}")


@pytest.mark.parametrize("absent_s", [2.0, pytest.param(30.0, marks=pytest.mark.long)])
def test_a_store_of_rays_that_is_killed_and_comes_back(
    cluster: RayHosts, streams: SteadyStreams, absent_s: float
) -> None:
    """The GCS: nobody can be found, started or declared dead meanwhile."""
    gcs = cluster.gcs()
    command, environment = gcs.cmdline(), gcs.environ()

    def kill() -> None:
        gcs.kill()
        time.sleep(absent_s)
        cluster.head.start_quietly(command, environment)
        time.sleep(2)

    check(seen_during(cluster, streams, kill))
    assert cluster.gcs().pid != gcs.pid


@pytest.mark.parametrize("absent_s", [8.0, pytest.param(20.0, marks=pytest.mark.long)])
def test_a_host_that_is_cut_off_and_joins_again(cluster: RayHosts, streams: SteadyStreams, absent_s: float) -> None:
    lonely = cluster.others[0]

    def cut() -> None:
        lonely.cut()
        time.sleep(absent_s)
        lonely.rejoin()

    check(seen_during(cluster, streams, cut))
    told: list[dict[str, float]] = []

    def have_rows() -> bool:
        """Whether four shards have more than at an earlier look."""
        check(cluster.head.run(lambda: streams.run(0.5)))
        now = cluster.head.run(frames)
        more = [sum(now.get(shard, 0.0) > number for shard, number in earlier.items()) for earlier in told]
        told.append(now)
        return max(more, default=0) >= 4

    wait_for(have_rows, RECOVERY_S, "rows for every replica")


def test_a_host_that_dies(cluster: RayHosts, streams: SteadyStreams) -> None:
    """What it had is started on the other one, and no stream waits for that."""
    dead, alive = cluster.others

    def kill() -> None:
        dead.kill()
        everything = ["expert-0", "expert-0", "expert-1", "expert-1"]
        wait_for(lambda: cluster.experts_on(alive) == everything, RECOVERY_S, "replicas on the other host")

    check(seen_during(cluster, streams, kill))
