"""The names of vLLM's metrics: those that dashboards ask for are there, and docs/metrics.md lists them and no other."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import EngineStats
from cluster.telemetry.kernels import ProcessKernels
from gateway.telemetry.metrics import GatewayMetrics, RequestTimer
from router_service.telemetry.engine_metrics import EngineMetrics
from tests.end_to_end.telemetry.test_metrics import VLLM
from tests.programs import REPOSITORY

PAGE = REPOSITORY / "docs" / "metrics.md"


def families() -> dict[str, set[str]]:
    """Of a gateway and a coordinator: each name of vLLM's as docs have it, and the names of its samples."""
    gateway = GatewayMetrics()
    timer = RequestTimer(gateway, "tiny", 1)
    timer.asked = (1, 5)
    for reason in (None, "stop"):
        timer.tokens(0, 1, reason)
    timer.end(3, 2)
    coordinator = EngineMetrics("r", (), {})
    stats = EngineStats(0, 0, 8, 0, 0, 0, 0, 0, 0, ())
    cache: dict[str, object] = {"block_size": 16, "num_gpu_blocks": 8, "enable_prefix_caching": True}
    coordinator.watch(lambda: stats, cache, ProcessKernels("float32", "torch", False, "znver4"))
    text = (generate_latest(gateway.registry) + generate_latest(coordinator._registry)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("vllm:") and not family.name.endswith("_created"):  # the client's own
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = {sample.name for sample in family.samples}
    return found


def test_the_names_that_vllms_own_test_expects_are_there() -> None:
    assert len(VLLM) == 44
    assert {name for names in families().values() for name in names} >= VLLM


def test_the_page_lists_every_name_that_is_there_and_none_that_is_not() -> None:
    """A name that goes, or comes, has to be told: dashboards are made by that page."""
    there, not_there = PAGE.read_text().split("Other names of vLLM are not there")
    names = families().keys()
    assert set(re.findall(r"`(vllm:\w+)`", there.partition("| name |")[2])) == names
    table = not_there.partition("| name |")[2]
    reasons = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    for _, absent, reason, _ in reasons:
        for pattern in re.findall(r"`(vllm:[\w*]+)`", absent):
            assert not any(fnmatch(name, pattern) for name in names), pattern
        assert set(re.findall(r"`(vllm:\w+)`", reason)) <= names, "what is there instead"
    assert reasons
