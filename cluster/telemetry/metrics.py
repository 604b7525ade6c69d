"""Figures of one process as Prometheus families, and how those of many processes become one page. Knows no process.

Each process has a registry of its own and hands out what is in it (`ProcessFigures`, plain data that can be pickled);
whoever gathers adds the labels that say where a figure comes from, and `exposition` writes all of them as one text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

MAX_BUCKET = 24  # of PowerOfTwoBuckets: what is longer counts as this long


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What one process counted."""

    replica: str  # Serve's unique id of it
    families: tuple[Metric, ...]


class PowerOfTwoBuckets:
    """Counts durations by their power of two in microseconds: bucket i holds those below 2^i µs. One writer.

    For hot paths: an observation is one call of `bit_length` and two additions, without a lock.
    """

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (MAX_BUCKET + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[min(int(seconds * 1e6).bit_length(), MAX_BUCKET)] += 1
        self.total_s += seconds

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Add this as a series of `family`, whose unit is the second."""
        counts = list(self.counts)
        buckets: list[tuple[str, float]] = []
        total = 0
        for power, count in enumerate(counts[:MAX_BUCKET]):
            total += count
            buckets.append((repr(2**power / 1e6), total))
        buckets.append(("+Inf", total + counts[MAX_BUCKET]))
        family.add_metric(labels, buckets=buckets, sum_value=self.total_s)


class DispatchCounts(PowerOfTwoBuckets):
    """How long the dispatches to one group took, and how many of them were asked of a second replica as well."""

    __slots__ = ("hedges",)

    def __init__(self) -> None:
        super().__init__()
        self.hedges = 0


def labelled(families: Iterable[Metric], labels: Mapping[str, str]) -> list[Metric]:
    """The same with more labels on every sample; those that a sample has already stay as they are."""
    result = []
    for family in families:
        copy = Metric(family.name, family.documentation, family.type, family.unit)
        copy.samples = [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
        result.append(copy)
    return result


def exposition(families: Iterable[Metric]) -> bytes:
    """One text in Prometheus' format; families of one name, from whichever process, are written as one."""
    merged: dict[str, Metric] = {}
    for family in families:
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        known = merged.get(family.name)
        if known is None:
            known = merged[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
        known.samples += samples
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gathered(list(merged.values())))
    return generate_latest(registry)


class _Gathered(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
