"""The NetworkPolicies, as a table of who may reach whom. What enforces them is the cluster's own network."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.overlays import REPOSITORY, build, needs_kubectl

pytestmark = needs_kubectl

OVERLAY = REPOSITORY / "k8s" / "overlays" / "gcs-fault-tolerance"
Pod = tuple[dict[str, str], dict[str, str]]  # its labels, and those of its namespace

OURS = {"kubernetes.io/metadata.name": "manta"}
HEAD, GATEWAY, COORDINATOR, EXPERT, REDIS = (
    ({"manta/role": role}, OURS) for role in ("head", "gateway", "coordinator", "expert", "redis")
)
INGRESS: Pod = ({"app": "nginx"}, {"manta/callers": "allowed"})
PROMETHEUS: Pod = ({"app.kubernetes.io/name": "prometheus"}, {"manta/monitoring": "allowed"})
OPERATOR: Pod = ({"app.kubernetes.io/name": "kuberay-operator"}, {"kubernetes.io/metadata.name": "kuberay-system"})
COLLECTOR: Pod = ({"app": "collector"}, {"manta/traces": "allowed"})
STRANGER: Pod = ({"app": "other"}, {"kubernetes.io/metadata.name": "other"})
OPENSHIFT_DNS: Pod = (
    {"dns.operator.openshift.io/daemonset-dns": "default"},
    {"kubernetes.io/metadata.name": "openshift-dns"},
)
DNS: Pod = ({"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    among = all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))
    return wanted and among


def _peer(peer: dict[str, Any], pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False  # an address, of no pod here
    if "namespaceSelector" not in peer and pod[1] is not OURS:
        return False
    return _selects(peer.get("namespaceSelector", {}), pod[1]) and _selects(peer.get("podSelector", {}), pod[0])


def _allowed(direction: str, pod: Pod, other: Pod, port: int) -> bool:
    """By any policy that selects the pod; a pod that none selects may do everything."""
    policies = [one["spec"] for one in build(OVERLAY) if one["kind"] == "NetworkPolicy"]
    binding = [
        one
        for one in policies
        if direction in one["policyTypes"] and pod[1] is OURS and _selects(one["podSelector"], pod[0])
    ]
    if not binding:
        return True
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return any(
        any(_peer(peer, other) for peer in rule[peers])
        and port in [one["port"] for one in rule.get("ports", [{"port": port}])]
        for policy in binding
        for rule in policy.get(key, [])
    )


def reaches(pod: Pod, other: Pod, port: int) -> bool:
    return _allowed("Egress", pod, other, port) and _allowed("Ingress", other, pod, port)


@pytest.mark.parametrize("port", [6379, 10001, 30000, 40000, 45678])
@pytest.mark.parametrize("pod", [HEAD, GATEWAY, COORDINATOR, EXPERT])
@pytest.mark.parametrize("other", [HEAD, GATEWAY, COORDINATOR, EXPERT])
def test_ports_of_ray_and_lanes_are_open_inside_only(pod: Pod, other: Pod, port: int) -> None:
    assert reaches(pod, other, port)
    for outside in (INGRESS, PROMETHEUS, OPERATOR, STRANGER, DNS):
        assert not reaches(outside, pod, port)


def test_the_doors() -> None:
    for port in (8000, 9000):
        assert reaches(INGRESS, GATEWAY, port)
        for pod in (HEAD, COORDINATOR, EXPERT):
            assert not reaches(INGRESS, pod, port)
        assert not reaches(STRANGER, GATEWAY, port)


def test_who_looks() -> None:
    assert reaches(PROMETHEUS, HEAD, 8000)
    assert not reaches(PROMETHEUS, GATEWAY, 8000)
    assert all(reaches(PROMETHEUS, pod, 8080) for pod in (HEAD, GATEWAY, COORDINATOR, EXPERT))
    assert reaches(OPERATOR, HEAD, 8265)
    assert not reaches(OPERATOR, EXPERT, 8265)
    assert not reaches(STRANGER, HEAD, 8265)


def test_out_goes_only_dns() -> None:
    for pod in (HEAD, GATEWAY, COORDINATOR, EXPERT):
        assert reaches(pod, DNS, 53)
        assert reaches(pod, OPENSHIFT_DNS, 5353)
        assert not reaches(pod, STRANGER, 443)
        assert not reaches(pod, DNS, 443)


def test_spans_reach_a_collector_and_nobody_else() -> None:
    for pod in (GATEWAY, COORDINATOR):
        assert reaches(pod, COLLECTOR, 4318)
        assert not reaches(pod, COLLECTOR, 443)
        assert not reaches(pod, STRANGER, 4318)
        assert not reaches(COLLECTOR, pod, 8000)
    assert not reaches(EXPERT, COLLECTOR, 4318)


def test_redis_is_the_heads() -> None:
    assert reaches(HEAD, REDIS, 6379)
    for pod in (GATEWAY, COORDINATOR, EXPERT, STRANGER):
        assert not reaches(pod, REDIS, 6379)
    assert not reaches(REDIS, HEAD, 6379)


def test_only_who_asks_the_api_server_reaches_addresses_and_never_the_clouds_credentials() -> None:
    """A cluster's API server may have a public address; 169.254.169.254 gives out the machine's own credentials."""
    outside = {}
    for policy in (one for one in build(OVERLAY) if one["kind"] == "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                if "ipBlock" in peer and peer["ipBlock"]["cidr"] == "0.0.0.0/0":
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]
                    outside[policy["metadata"]["name"]] = policy["spec"]["podSelector"]
    assert set(outside) == {"manta-api-server", "manta-hub"}
    assert _selects(outside["manta-api-server"], {"manta/role": "head", "manta/api-server": "yes"})
    assert not _selects(outside["manta-api-server"], EXPERT[0])
