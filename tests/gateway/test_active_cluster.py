"""An upgrade seen by the gateways of two Ray clusters: names as KubeRay moves them, at a clock of our own."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from cluster.messages import ModelCard
from gateway import active_cluster
from gateway.active_cluster import GRACE_S, ActiveCluster, resolve
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, tokens_script

OLD, NEW = "10.0.0.1", "10.0.0.2"
ACTIVE, OF_OLD, OF_NEW = "manta-head-svc", "manta-abcde-head-svc.manta.svc", "manta-fghij-head-svc.manta.svc"


class Cluster:
    """Its DNS and its time."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {OF_OLD: {OLD}}
        self.now = 1000.0

    def gateway(self, own: str, head: str) -> ActiveCluster:
        return ActiveCluster(
            ACTIVE,
            own,
            resolve=lambda name: frozenset(self.names.get(name, ())),
            heads=lambda: frozenset({head}),
            clock=lambda: self.now,
        )


def says(gateway: ActiveCluster) -> bool:
    return asyncio.run(gateway.is_this())


def test_an_upgrade_never_leaves_clients_without_a_cluster_and_ends_with_one() -> None:
    """Both were asked for the 12 minutes that the old one stays, and the new one before KubeRay had switched to it."""
    kubernetes = Cluster()
    old = kubernetes.gateway(OF_OLD, OLD)
    assert says(old), "the first cluster, before KubeRay has made the Service"
    kubernetes.names[ACTIVE] = {OLD}
    kubernetes.now += 60
    assert says(old)

    kubernetes.names[OF_NEW] = {NEW}
    new = kubernetes.gateway(OF_NEW, NEW)
    assert not says(new), "its models load"
    assert says(old)

    kubernetes.names[ACTIVE] = {NEW}  # its applications run
    kubernetes.now += 2
    answers = []
    for _ in range(100):
        answers.append((says(old), says(new)))
        kubernetes.now += 1
    switched = answers.index((False, True))
    assert answers[0] == (True, True)
    assert set(answers[:switched]) == {(True, True)}, "nobody is without an answer"
    assert set(answers[switched:]) == {(False, True)}
    assert switched == pytest.approx(GRACE_S, abs=2)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({}, "no DNS"),
        ({OF_OLD: {OLD}}, "no Service yet"),
        ({ACTIVE: {NEW}}, "our own name is not known now"),
        ({ACTIVE: {"10.96.0.7"}, OF_OLD: {"10.96.0.8"}}, "Services with addresses of their own"),
        ({ACTIVE: {OLD, "fd00::1"}, OF_OLD: {OLD}}, "two families of addresses"),
        ({ACTIVE: {"10.0.0.9"}, OF_OLD: {"10.0.0.9"}}, "the head came back elsewhere, and Ray does not know yet"),
    ],
)
def test_who_is_not_sure_says_yes(names: dict[str, set[str]], why: str) -> None:
    kubernetes = Cluster()
    kubernetes.names = names
    gateway = kubernetes.gateway(OF_OLD, OLD)
    for _ in range(200):
        assert says(gateway), why
        kubernetes.now += 1


def test_a_hiccup_changes_nothing_and_a_silence_of_a_minute_does() -> None:
    """One answer that DNS did not have made a cluster whose models load ready, for more than a minute."""
    kubernetes = Cluster()
    kubernetes.names |= {ACTIVE: {OLD}, OF_NEW: {NEW}}
    new = kubernetes.gateway(OF_NEW, NEW)
    assert not says(new)
    kubernetes.now += 5
    kubernetes.names[ACTIVE] = set()
    assert not says(new)
    kubernetes.now += 5
    kubernetes.names[ACTIVE] = {OLD}
    assert not says(new)
    kubernetes.names.clear()
    kubernetes.now += GRACE_S - 1
    assert not says(new)
    kubernetes.now += 1
    assert says(new)


def test_who_cannot_ask_at_first_may_still_be_the_second() -> None:
    """What Ray raised while the cluster started was taken for an active cluster, which answers for a minute more."""
    kubernetes = Cluster()
    kubernetes.names |= {OF_NEW: {NEW}}
    new = kubernetes.gateway(OF_NEW, NEW)
    assert says(new)
    kubernetes.names[ACTIVE] = {OLD}
    kubernetes.now += 5
    assert not says(new)


def test_a_head_that_comes_back_elsewhere_takes_no_gateway_away() -> None:
    """DNS tells its address under one name earlier than under the other; Ray may know both for a while."""
    kubernetes = Cluster()
    kubernetes.names[ACTIVE] = {OLD}
    heads = {OLD}
    gateway = ActiveCluster(
        ACTIVE,
        OF_OLD,
        resolve=lambda name: frozenset(kubernetes.names.get(name, ())),
        heads=lambda: frozenset(heads),
        clock=lambda: kubernetes.now,
    )
    assert says(gateway)
    kubernetes.names[OF_OLD] = {NEW}
    heads.add(NEW)
    for second in range(70):
        if second == 35:
            heads.remove(OLD)
        kubernetes.now += 1
        assert says(gateway)
    kubernetes.names[ACTIVE] = {NEW}
    kubernetes.now += 1
    assert says(gateway)
    assert gateway._replaced_at is None


def test_names_are_asked_for_from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a search domain of the node answers every name, the Service was there before KubeRay had made it."""
    monkeypatch.setenv("MANTA_ACTIVE_HEAD", ACTIVE)
    monkeypatch.setenv("FQ_RAY_IP", "manta-abcde-head-svc.manta.svc.cluster.local")
    assert ActiveCluster.of_environment()._names == (
        "manta-head-svc.manta.svc.cluster.local.",
        "manta-abcde-head-svc.manta.svc.cluster.local.",
    )
    monkeypatch.delenv("FQ_RAY_IP")
    assert ActiveCluster.of_environment()._names is None


def test_one_machine_asks_nobody() -> None:
    def nobody(*_: object) -> frozenset[str]:
        raise AssertionError

    assert says(ActiveCluster(resolve=nobody, heads=nobody))
    assert says(ActiveCluster(ACTIVE, None, resolve=nobody, heads=nobody))


def test_what_ray_raises_is_not_sure() -> None:
    def away() -> frozenset[str]:
        raise ConnectionError("GCS")

    names = {ACTIVE: frozenset({NEW}), OF_OLD: frozenset({OLD})}
    assert says(ActiveCluster(ACTIVE, OF_OLD, resolve=names.__getitem__, heads=away))


def test_a_resolver_that_hangs_holds_no_probe_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_cluster, "LOOK_TIMEOUT_S", 0.05)
    free, asked = threading.Event(), []

    def hangs(name: str) -> frozenset[str]:
        asked.append(name)
        assert free.wait(60)
        return frozenset()

    async def ask() -> None:
        gateway = ActiveCluster(ACTIVE, OF_OLD, resolve=hangs)
        try:
            assert await asyncio.gather(*(gateway.is_this() for _ in range(20))) == [True] * 20
            assert len(asked) == 1
        finally:
            free.set()

    asyncio.run(ask())


def test_names_are_looked_up_by_the_pods_resolver() -> None:
    assert "127.0.0.1" in resolve("localhost")
    assert resolve("there-is-no-such-name.invalid") == frozenset()


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the module logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    active_cluster.logger.addHandler(handler)
    active_cluster.logger.setLevel(logging.INFO)
    yield stream
    active_cluster.logger.removeHandler(handler)
    active_cluster.logger.setLevel(logging.NOTSET)


def test_the_probe_of_two_gateways_while_kuberay_switches(
    card: ModelCard, lines: io.StringIO, serving: Callable[[Cluster], tuple[str, str]]
) -> None:
    """Over HTTP, as the kubelet asks; requests that come all the same are answered by both."""
    kubernetes = Cluster()
    kubernetes.names |= {ACTIVE: {OLD}, OF_NEW: {NEW}}
    urls = serving(kubernetes)

    def statuses() -> list[int]:
        kubernetes.now += 5
        return [httpx.get(f"{url}/-/ready").status_code for url in urls]

    assert statuses() == [200, 503]
    kubernetes.names[ACTIVE] = {NEW}
    assert statuses() == [200, 200]
    kubernetes.now += GRACE_S
    assert statuses() == [503, 200]
    for url in urls:
        assert httpx.get(f"{url}/health").status_code == 200
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    said = lines.getvalue().splitlines()
    assert [line.split(":")[0] for line in said] == [
        "another Ray cluster is the active one",
        "this Ray cluster is the active one now",
        "another Ray cluster is the active one",
    ]


@pytest.fixture
def serving(card: ModelCard) -> Iterator[Callable[[Cluster], tuple[str, str]]]:
    """The HTTP doors of a gateway of each cluster; what starts them returns their URLs, the old one's first."""
    with ExitStack() as stack:

        def start(kubernetes: Cluster) -> tuple[str, str]:
            urls = []
            for own, head in ((OF_OLD, OLD), (OF_NEW, NEW)):
                frontend = build_frontend(card, ScriptedCoordinator(tokens_script([40, 41])))
                frontend.active_cluster = kubernetes.gateway(own, head)
                urls.append(stack.enter_context(http_server(frontend)))
            return urls[0], urls[1]

        yield start
