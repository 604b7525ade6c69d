"""What Prometheus and Grafana are given.

That the figures exist is asked of a server, in end_to_end/telemetry/test_metrics.py.
"""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.planning.placement import ExpertGroup
from cluster.telemetry.metrics import DispatchCounts, ProcessFigures
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.metrics_page import MetricsPage, Source
from router_service.telemetry.engine_metrics import expert_families
from tests.gateway.doubles import model_card
from tests.gateway.telemetry.test_metrics import values
from tests.k8s.overlays import REPOSITORY, needs_kubectl, the

OVERLAY = REPOSITORY / "k8s" / "overlays" / "mixtral-8x7b-8gpu"
RULES = yaml.safe_load((REPOSITORY / "k8s/monitoring/prometheus-rule.yaml").read_text())["spec"]["groups"][0]["rules"]


@needs_kubectl
def test_the_dashboard_is_the_one_file() -> None:
    dashboard = the(OVERLAY, "ConfigMap", "manta-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"] == {"manta.json": (REPOSITORY / "k8s/grafana/manta.json").read_text()}


@needs_kubectl
def test_every_process_is_counted_once() -> None:
    """A gateway's page has the figures of all: who reads it from each gateway pod counts each as often."""
    monitor = the(OVERLAY, "PodMonitor", "manta")["spec"]
    assert monitor["selector"]["matchLabels"] == {"manta/role": "head"}
    [endpoint] = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["honorLabels"]) == ("serve", True)
    assert endpoint["authorization"]["credentials"] == {"name": "manta-metrics-token", "key": "token"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_can_be_read(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["summary"]
    for opening, closing in ("()", "{}", "[]"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)
    for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
        assert re.search(rf"(by|on) \([^)]*\b{label}\b", rule["expr"]), f"{label} is not in the result"


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", (REPOSITORY / "docs" / "runbooks.md").read_text(), re.MULTILINE)
    assert set(sections) == {rule["alert"] for rule in RULES}
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def _expr(alert: str) -> str:
    [expr] = [rule["expr"] for rule in RULES if rule["alert"] == alert]
    return str(expr)


@pytest.mark.parametrize("has_shards", [True, False], ids=["shards", "experts in the coordinator's process"])
def test_groups_without_shards_are_not_down(has_shards: bool) -> None:
    """Of `transport: local` rows are counted as well: the alert fired for as long as such a model was served."""
    groups = [ExpertGroup(0, (0, 1)), ExpertGroup(1, (2, 3))]
    latency = {group.index: DispatchCounts() for group in groups if has_shards}
    told = {sample.name for family in expert_families(groups, [1, 2, 3, 4], latency) for sample in family.samples}
    known, missing = _expr("MantaExpertDown").split("unless")
    [groups_of] = re.findall(r"manta_\w+", known)
    assert (groups_of in told) is has_shards
    assert "manta_shard_lanes" in missing


def test_a_model_without_a_coordinator_is_told_where_others_have_one(tmp_path: Path) -> None:
    """And a queue that is full, which grows no more: no alert was about either."""

    async def silent(_source: Source, _timeout_s: float) -> tuple[list[ProcessFigures], int]:
        raise TimeoutError

    card, metrics = model_card(tmp_path, deployments=("coordinator",)), GatewayMetrics()
    metrics.failures.labels(card.name, "Overloaded", "shed_queue").inc()
    page = asyncio.run(MetricsPage(metrics, [card], silent).page()).decode()
    for alert in ("MantaSilent", "MantaQueueGrowing"):
        [(name, label, wanted)] = re.findall(r'(\w+)\{(\w+)="(\w+)"\}', _expr(alert))
        assert values(page, name, model=card.name, **{label: wanted}) == [1]


def test_figures_that_any_program_has_are_asked_of_ours_only() -> None:
    """Prometheus' clients have them in every language: the panels had a line for each program that it looks at."""
    panels = json.loads((REPOSITORY / "k8s/grafana/manta.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    asked = [one for text in expressions for one in re.findall(r"process_\w+(?:\{.*?\})?", text)]
    assert len(asked) == 2
    assert all('deployment!=""' in one and 'replica!=""' in one for one in asked)


def test_what_the_alerts_are_about() -> None:
    names = {rule["alert"] for rule in RULES}
    assert {"MantaExpertDown", "MantaExpertImbalance", "MantaQueueGrowing", "MantaFirstTokenBurn"} <= names
