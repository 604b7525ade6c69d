"""The figures of one expert group's replica as Prometheus families, from what its shard counts. Knows no transport."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from cluster.telemetry.kernels import kernels_family

if TYPE_CHECKING:
    from experts_service.shard.shard import ShardStats


def shard_families(
    stats: ShardStats, experts: tuple[int, ...], busy_fraction: float, restarts: int
) -> Iterable[Metric]:
    """`experts` are the group's, in its order; `busy_fraction` is of the last second or so."""
    group = str(stats.group)
    rows = CounterMetricFamily("manta_shard_rows", "Rows computed, over all layers.", labels=["group", "expert"])
    for expert, count in zip(experts, stats.rows_per_expert, strict=True):
        rows.add_metric([group, str(expert)], count)
    yield rows
    for name, documentation, value in (
        ("manta_shard_batches", "Calls of the maths.", stats.calls),
        ("manta_shard_busy_seconds", "Time spent computing.", stats.busy_s),
        ("manta_shard_frames", "Dispatches that came over lanes.", stats.lane_frames),
        ("manta_shard_queue_seconds", "Time those waited for their turn.", stats.lane_queue_s),
        ("manta_shard_late_frames", "Dispatches whose deadline passed before their turn.", stats.lane_late),
        ("manta_shard_refused_peers", "Peers whose handshake or frames were wrong.", stats.lane_refused),
        ("manta_shard_restarts", "Times that the shard was replaced below its replica.", restarts),
    ):
        counter = CounterMetricFamily(name, documentation, labels=["group"])
        counter.add_metric([group], value)
        yield counter
    for name, documentation, number in (
        ("manta_shard_busy_fraction", "Part of the last second spent computing.", busy_fraction),
        ("manta_shard_lanes", "Coordinators connected now.", stats.lane_connections),
        ("manta_shard_load_seconds", "Time it took to load the weights.", stats.loaded_s),
        ("manta_shard_resident_memory_bytes", "Memory of the shard's process.", stats.resident_bytes),
    ):
        gauge = GaugeMetricFamily(name, documentation, labels=["group"])
        gauge.add_metric([group], number)
        yield gauge
    yield kernels_family(stats.kernels)
