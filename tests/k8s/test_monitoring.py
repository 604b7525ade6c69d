"""What Prometheus and Grafana are given. That the figures exist is asked of a server, in end_to_end/test_metrics.py."""

import re
from typing import Any

import pytest
import yaml

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


def test_what_the_alerts_are_about() -> None:
    names = {rule["alert"] for rule in RULES}
    assert {"MantaExpertDown", "MantaExpertImbalance", "MantaQueueGrowing", "MantaFirstTokenBurn"} <= names
