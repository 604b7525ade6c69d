"""`manta status --watch`: rates between two samples of what processes counted, and how they are drawn."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from cluster.commands.status.load_tables import BAR_WIDTH, draw_load
from cluster.commands.status.model_load import LoadSample, load_between
from cluster.commands.status.tables import MOST_EXPERTS
from cluster.messages import EngineStats
from cluster.planning.placement import ExpertGroup
from cluster.telemetry.kernels import ProcessKernels
from cluster.telemetry.metrics import DispatchCounts
from experts_service.shard.metrics import shard_families
from experts_service.shard.shard import ShardStats
from router_service.telemetry.engine_metrics import engine_families, expert_families

KERNELS = ProcessKernels("bfloat16", "fma", True, "znver4")
GROUPS = (ExpertGroup(0, (0, 2)), ExpertGroup(1, (1, 3)))


def coordinator(rows, tokens):
    stats = EngineStats(3, 4, 100, 25, 10 * tokens, tokens, 0, 0, 7, rows)
    latency = {group.index: DispatchCounts() for group in GROUPS}
    return [*engine_families(stats), *expert_families(GROUPS, rows, latency)]


def shard(group, busy, frames, queue_s):
    stats = ShardStats("x", group.index, (0, 0), 1, 1.0, 1.0, KERNELS, lane_frames=frames, lane_queue_s=queue_s)
    return list(shard_families(stats, group.experts, busy, 0))


def load(with_shards=True):
    before = [coordinator((0, 10, 0, 10), 100)]
    after = [coordinator((40, 10, 20, 10), 150)]
    if with_shards:
        before += [shard(GROUPS[0], 0.1, 10, 1.0), shard(GROUPS[1], 0.0, 0, 0.0)]
        after += [shard(GROUPS[0], 0.95, 30, 1.2), shard(GROUPS[0], 0.85, 0, 0.0), shard(GROUPS[1], 0.0, 0, 0.0)]
    return load_between(LoadSample.of("m", 5.0, before), LoadSample.of("m", 7.0, after))


def test_rates_are_those_between_the_samples():
    seen = load()
    assert (seen.running, seen.waiting, seen.kv_usage) == (3, 4, 0.25)
    assert (seen.tokens_per_s, seen.prompt_tokens_per_s) == (25, 250)
    assert [(e.expert, e.group, e.rows_per_s, e.rows) for e in seen.experts] == [
        (0, 0, 20, 40), (1, 1, 0, 10), (2, 0, 10, 20), (3, 1, 0, 10),
    ]  # fmt: skip
    assert round(seen.experts[0].busy_fraction, 6) == 0.9, "the mean of both replicas"
    assert round(seen.experts[0].queue_s, 6) == 0.01
    assert seen.experts[1].queue_s == 0


def test_the_cache_of_two_coordinators_is_one():
    """Their parts were added up: two half full caches were told as 100 %."""
    sample = LoadSample.of("m", 5.0, [coordinator((), 0), coordinator((), 0)])
    seen = load_between(sample, sample)
    assert (seen.running, seen.kv_usage) == (6, 0.25)


def test_silent_shards_and_a_restarted_coordinator():
    assert [e.busy_fraction for e in load(with_shards=False).experts] == [None] * 4
    restarted = load_between(
        LoadSample.of("m", 5.0, [coordinator((40, 10, 20, 10), 150)]),
        LoadSample.of("m", 7.0, [coordinator((0, 0, 0, 1), 1)]),
    )
    assert [e.rows_per_s for e in restarted.experts] == [0] * 4
    assert restarted.tokens_per_s == 0


def test_every_expert_has_a_line():
    file = io.StringIO()
    Console(file=file, width=100).print(draw_load([load()]))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[0][:4] == ["m", "3", "running", "·"]
    assert ["0", "0", "20", "█" * BAR_WIDTH, "90%", "10.0", "ms", "40"] in lines
    assert ["1", "1", "0", "·" * BAR_WIDTH, "0%", "0.0", "ms", "10"] in lines
    assert "No model" in str(draw_load([]))


def test_of_many_experts_the_busiest_have_one():
    one = load().experts[0]
    many = tuple(replace(one, expert=number, rows_per_s=float(number), rows=number) for number in range(256))
    file = io.StringIO()
    Console(file=file, width=100).print(draw_load([replace(load(), experts=many)]))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert [line[0] for line in lines[2 : 2 + MOST_EXPERTS]] == [str(255 - place) for place in range(MOST_EXPERTS)]
    assert lines[2 + MOST_EXPERTS] == [str(256 - MOST_EXPERTS), "others", *2 * [str(sum(range(256 - MOST_EXPERTS)))]]
