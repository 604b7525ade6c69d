"""Replicas of one expert deployment, by name, and a routing table that has published some."""

from __future__ import annotations

from experts_service.routing_table import Deployment, Replica, RoutingTable

DEPLOYMENT = Deployment("model", "expert-0")


def replica(name: str) -> Replica:
    return Replica(name, f"shard-{name}", "test", 0, "fingerprint")


def table(*names: str) -> RoutingTable:
    published = RoutingTable()
    published.publish(DEPLOYMENT, [replica(name) for name in names])
    return published
