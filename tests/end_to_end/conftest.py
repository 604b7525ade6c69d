"""What the engine of the running server says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cluster.messages import EngineStats


@pytest.fixture(scope="session")
def engine_stats(ray_cluster) -> Callable[[], EngineStats]:
    """Asks the coordinator of the demo's Mixtral."""
    from ray import serve

    [application] = [name for name in serve.status().applications if name.startswith("mistral-small-")]
    handle = serve.get_deployment_handle("coordinator", app_name=application)
    return lambda: handle.stats.remote().result(timeout_s=30)


@pytest.fixture
def wait_until_idle(engine_stats):
    """Waits until queue, running batch and KV blocks are empty; returns the seconds it took."""

    def wait(timeout_s: float) -> float:
        started = time.monotonic()
        while True:
            stats = engine_stats()
            busy = (stats.num_requests_running, stats.num_requests_waiting, stats.num_kv_blocks_used)
            waited = time.monotonic() - started
            if busy == (0, 0, 0):
                return waited
            assert waited < timeout_s, f"(running, waiting, KV blocks) = {busy} after {waited:.1f} s"
            time.sleep(0.02)

    return wait
