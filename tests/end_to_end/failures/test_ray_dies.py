"""What becomes of a server when parts of Ray are killed that it cannot be without, or that hold what clients reach."""

from __future__ import annotations

import time

import httpx
import psutil
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.conftest import Server, running_server
from tests.processes import called, has_ended, processes
from tests.waiting import wait_for

CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    engine: {{dtype: float32, max_model_len: 512, kv_cache_gib: 0.02}}
"""
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
BOTH_TRANSPORTS = "".join(
    f"""
  - name: {name}
    path: {DEMO}
    engine: {{dtype: float32, max_model_len: 512, kv_cache_gib: 0.02}}
    experts: {{transport: {name}, groups: {GROUPS}}}"""
    for name in ("object_store", "lane")
)
SECONDS = 60  # on a busy machine; one, and what kills take

pytestmark = pytest.mark.long


@pytest.mark.parametrize("killed", [["gcs_server"], ["raylet"], ["gcs_server", "raylet"]], ids="+".join)
def test_a_server_whose_ray_dies_says_so_and_leaves_nothing(killed: list[str]) -> None:
    """It went on with nothing that replaces what dies. After Ctrl-C it stood for a minute, and left HAProxy."""
    with pytest.raises(AssertionError, match="Ray has died"):  # of running_server, with all that the server has said
        ends_without(killed)


def ends_without(killed: list[str]) -> None:
    with running_server(CONFIG) as server:
        all_of_it = psutil.Process(server.process.pid).children(recursive=True)
        for name in killed:
            called(name, all_of_it).kill()
        assert server.process.wait(SECONDS) == 2
        assert [one for one in all_of_it if not has_ended(one)] == []


def test_a_proxy_that_dies_is_started_again_and_answers() -> None:
    """HAProxyManager, which controls HAProxy for Serve. Ray ends HAProxy with it, and clients are refused meanwhile."""
    with running_server(CONFIG) as server:
        [old] = haproxies(server)
        manager = old.parent()
        assert manager is not None
        manager.kill()
        began = time.monotonic()
        wait_for(lambda: old not in haproxies(server) and answers(server), 3 * SECONDS, "another")
        print(f"clients were answered again after {time.monotonic() - began:.1f} s")


def test_the_first_requests_are_answered_while_the_gcs_stands_still() -> None:
    """A coordinator's first dispatch asked it for the shards, on the engine's thread: streams stood for a minute."""
    with running_server(f"models:{BOTH_TRANSPORTS}") as server:
        of_server = psutil.Process(server.process.pid).children(recursive=True)
        gcs = called("gcs_server", of_server)
        gcs.suspend()
        try:
            for model in ("object_store", "lane"):
                began = time.monotonic()
                text = {"model": model, "prompt": "The capital of France is", "max_tokens": 8}
                answer = httpx.post(f"{server.url}/v1/completions", json=text, timeout=SECONDS)
                print(f"{model}: {answer.status_code} after {time.monotonic() - began:.1f} s")
                assert answer.status_code == 200, answer.text
                assert time.monotonic() - began < SECONDS / 4
        finally:
            gcs.resume()


def haproxies(server: Server) -> list[psutil.Process]:
    return [one for one in processes(server, "haproxy.cfg") if not has_ended(one)]


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    except httpx.TransportError:
        return False
