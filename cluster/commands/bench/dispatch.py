"""`manta bench dispatch`: one layer's dispatch and combine over each transport, between real processes, without maths.

Every row goes to one expert of every group, so the bytes of a measurement are rows × groups × row, there and back.
`bare` is what those bytes take without Manta, Ray and torch: what is above it is ours.

A process that sleeps for its answer finds cold caches: 11 µs of torch calls after each bare round trip made that 47 to
74 µs longer. So the coordinator looks for answers that come soon instead of sleeping (`Link.wait`): 0.76 of the time
for one group, 0.81 for two, 0.96 for eight (blocks of 300 in turn in one process, 15 of each, three times).
"""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.commands.bench.echo import echoes
from cluster.commands.bench.machine import this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.serve.plot import check_plotting
from cluster.commands.local_ray.start import start_local_ray
from cluster.errors import ConfigError
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.auto import AutoTransport
from experts_service.carriers.dialer import LaneDialer, ask_shard
from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.jit import AVAILABLE, pointer
from experts_service.kernels.compiled.routine import Routine, Task
from experts_service.kernels.kernel import Kernel
from experts_service.kernels.selection import Selection
from experts_service.kernels.swiglu import Prepared
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.shard import ExpertShard, ShardSpec
from experts_service.shard.turns import TurnCounts
from experts_service.shard_handles import ShardHandles
from experts_service.transport import Flight, GroupRows, Transport
from experts_service.wire.secret import ensure_lane_secret, read_lane_secret
from router_service.dispatcher import Dispatcher

if AVAILABLE:
    from experts_service.kernels.compiled.system_calls import memcpy

NAMESPACE, FINGERPRINT = "manta-bench", "bench"
TIMEOUT_S = 60.0
Call = tuple[float, int, str, str]  # seconds in it alone, how often, file or "~" for C, name
BARE = "bare"
WARM_UP = 50
LONGEST_S = 10.0  # of one measurement; repeats beyond are left out
MOST_LINES = 20  # of a profile
OBJECT_STORE_BYTES = 512 * 2**20


@Routine
def _copy(task):  # type: ignore[no-untyped-def]
    """task[3] bytes from one address to another."""
    memcpy(pointer(task[2]), pointer(task[1]), task[3])


class _Identity:
    """Experts that answer with what they are asked."""

    num_layers = 1
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, hidden: int) -> None:
        self.dtype = dtype
        self.hidden = hidden
        self.profiler = cProfile.Profile()  # of the thread that runs rows
        self.is_to_be_profiled = False  # from the next rows on
        self._is_profiled = False

    def __call__(self, _layer: int, rows: Tensor, _counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        if self._is_profiled != self.is_to_be_profiled:
            self._is_profiled = self.is_to_be_profiled
            self.profiler.enable() if self._is_profiled else self.profiler.disable()
        return rows if answers is None else answers.copy_(rows)

    def prepared(self, _layer: int, rows: Tensor, _counts: Sequence[int], answers: Tensor) -> Prepared:
        copy = Task(_copy, 1, (rows.data_ptr(), answers.data_ptr(), rows.nbytes), (rows, answers))
        return Prepared(Chain([copy]), (), ())


class IdentityShard(ExpertShard):
    """A shard as it is, but for its weights: `directory` says how long a row is."""

    _experts: _Identity  # type: ignore[assignment]

    def profile(self, is_wanted: bool) -> None:
        """Have the thread that runs rows count its calls, or not any more, from the next rows on."""
        self._experts.is_to_be_profiled = is_wanted

    def calls(self) -> list[Call]:
        """What it has counted; then it starts anew."""
        calls = _calls(self._experts.profiler) if self._experts.profiler.getstats() else []
        self._experts.profiler.clear()
        return calls

    def turns(self) -> TurnCounts:
        """What it has run without Python."""
        assert self._lanes is not None
        return self._lanes.stats().compiled

    def _load(self) -> Any:
        torch.set_num_threads(1)
        dtype = getattr(torch, self._spec.dtype)
        self._kernels = Selection(Kernel.TORCH, {}).told(dtype, torch.device("cpu"))  # nothing is multiplied
        return _Identity(dtype, int(self._spec.directory))


class _LocalIdentity:
    """The floor: what dispatcher and copies cost when nothing leaves the process."""

    takes_device_rows = False

    def send(self, layer: int, rows: Tensor, parts: Sequence[GroupRows]) -> Flight:  # noqa: ARG002
        for part in parts:
            part.answer.copy_(rows.index_select(0, torch.from_numpy(part.row_indices)))
        return self

    def wait(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to close, neither as a flight nor as a transport."""


def run(
    rows: tuple[int, ...],
    groups: tuple[int, ...],
    hidden: int,
    dtype: str,
    repeats: int,
    transports: tuple[str, ...],
    plot: Path | None,
    *,
    profile: bool = False,
) -> None:
    """Print a table and one JSON line; draw cost over rows where `plot` names a file; say what calls take."""
    torch.set_num_threads(1)  # rows are copied and added, nothing is multiplied
    if plot is not None:
        check_plotting()
    output = Output()
    output.header(
        this_machine(),
        [
            f"rows of {hidden} × {dtype}, each to one expert of every group; shards are processes, no maths",
            f"medians of {repeats} round trips, or of as many as fit into {LONGEST_S:g} s",
        ],
    )
    results: list[dict[str, Any]] = []
    profiles: list[tuple[str, list[tuple[str, str, str]]]] = []

    def add(transport: str, count: int, number: int, round_trip: Callable[[], object]) -> None:
        p50, p99 = _measure(round_trip, repeats)
        results.append({"transport": transport, "rows": count, "groups": number, "p50_us": p50, "p99_us": p99})

    with _shards(max(groups), hidden, dtype) as table:
        for number in groups:
            deployments = {group: Deployment("bench", f"expert-{group}") for group in range(number)}
            for name in transports:
                dispatcher = Dispatcher(
                    [ExpertGroup(group, (group,)) for group in range(number)], _transport(name, deployments, table)
                )
                for count in rows:
                    round_trip = _round_trip(dispatcher, count, number, hidden, getattr(torch, dtype))
                    add(name, count, number, round_trip)
                    if profile:
                        what = f"{name}, {number} × {count}: calls"
                        profiles.append((f"{what} here", _profile(round_trip, repeats)))
                        if name != "local":
                            profiles.append((f"{what} in a shard", _profile_shard(round_trip, repeats)))
                dispatcher.close()
            for count in rows:
                with echoes(number, count * hidden * getattr(torch, dtype).itemsize) as round_trip:
                    add(BARE, count, number, round_trip)
    cells = {(r["groups"], r["rows"], r["transport"]): f"{r['p50_us']:.0f} / {r['p99_us']:.0f}" for r in results}
    output.table(
        "dispatch + combine, p50 / p99 in µs",
        ("groups × rows", BARE, *transports),
        [(f"{g} × {r}", *(cells[g, r, name] for name in (BARE, *transports))) for g in groups for r in rows],
    )
    for title, calls in profiles:
        output.table(title, ("function", "calls a dispatch", "µs a dispatch"), calls)
    if plot is not None:
        _draw(results, hidden, dtype, plot)
    output.json({"bench": "dispatch", "results": results})


def _transport(name: str, deployments: Mapping[int, Deployment], table: RoutingTable) -> Transport:
    import ray

    if name == "local":
        return _LocalIdentity()
    shards = ShardHandles(table, deployments.values())
    object_store = ObjectStoreTransport(deployments, table, shards, fingerprint=FINGERPRINT, timeout_s=TIMEOUT_S)
    if name == "object_store":
        return object_store
    dialer = LaneDialer(
        partial(ask_shard, shards),
        secret=read_lane_secret(ensure_lane_secret()),
        fingerprint=FINGERPRINT,
        node_id=ray.get_runtime_context().get_node_id(),
        memory=name in ("auto", "memory"),
    )
    lane = LaneTransport(deployments, table, dialer, timeout_s=TIMEOUT_S)
    return AutoTransport(lane, object_store) if name == "auto" else lane


@contextmanager
def _shards(number: int, hidden: int, dtype: str) -> Iterator[RoutingTable]:
    """Shard actors on a Ray of our own, as a routing table knows them."""
    import ray

    start_local_ray(OBJECT_STORE_BYTES, namespace=NAMESPACE)
    try:
        table = RoutingTable()
        actors = []
        for group in range(number):
            spec = ShardSpec(
                application="bench",
                directory=str(hidden),
                fingerprint=FINGERPRINT,
                group=group,
                experts=(group,),
                num_groups=number,
                dtype=dtype,  # type: ignore[arg-type]  # the command line offers these two
                lane_secret_file=str(ensure_lane_secret()),
            )
            actor = f"shard-{group}"
            actors.append(
                ray.remote(IdentityShard).options(name=actor, num_cpus=0, enable_task_events=False).remote(spec)
            )
            table.publish(Deployment("bench", spec.name), [Replica(actor, actor, NAMESPACE, group, FINGERPRINT)])
        ray.get([actor.stats.remote() for actor in actors], timeout=TIMEOUT_S + 10 * number)
        yield table
    finally:
        ray.shutdown()


def _round_trip(
    dispatcher: Dispatcher, num_rows: int, num_groups: int, hidden: int, dtype: torch.dtype
) -> Callable[[], object]:
    """One dispatch and combine of random rows."""
    rows = torch.randn(num_rows, hidden).to(dtype)  # [T, D]
    experts = torch.arange(num_groups).repeat(num_rows, 1)  # [T, K], one expert of each group
    weights = torch.full((num_rows, num_groups), 1.0 / num_groups)  # [T, K], fp32 as the gate's
    return lambda: dispatcher.combine(dispatcher.dispatch(0, rows, experts), weights)


@torch.inference_mode()
def _measure(round_trip: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Its median and 99th percentile, in µs."""
    deadline = time.perf_counter() + LONGEST_S
    seconds: list[float] = []
    for turn in range(WARM_UP + repeats):
        started = time.perf_counter()
        round_trip()
        ended = time.perf_counter()
        if turn >= min(WARM_UP, repeats):
            seconds.append(ended - started)
        if ended > deadline and len(seconds) >= 5:
            break
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e6
    return round(float(p50), 1), round(float(p99), 1)


@torch.inference_mode()
def _profile(round_trip: Callable[[], object], repeats: int) -> list[tuple[str, str, str]]:
    """What this process calls in a dispatch, the costliest first: name, how often, µs in it alone, as the profiler sees
    them. It makes calls of Python slower than they are, and those of C hardly.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(repeats):
        round_trip()
    profiler.disable()
    return _costliest(_calls(profiler), repeats)


@torch.inference_mode()
def _profile_shard(round_trip: Callable[[], object], repeats: int) -> list[tuple[str, str, str]]:
    """The same of the thread that runs the first group's rows, which sleeps in epoll between them: of Python's calls,
    and of turns that take none.
    """
    import ray

    shard = ray.get_actor("shard-0", namespace=NAMESPACE)
    before: TurnCounts = ray.get(shard.turns.remote(), timeout=TIMEOUT_S)
    for is_wanted, number in ((True, repeats), (False, 1)):
        ray.get(shard.profile.remote(is_wanted), timeout=TIMEOUT_S)
        for _ in range(number):
            round_trip()
    after: TurnCounts = ray.get(shard.turns.remote(), timeout=TIMEOUT_S)
    lines = _costliest(ray.get(shard.calls.remote(), timeout=TIMEOUT_S), repeats)
    frames = after.frames - before.frames
    if frames:
        for what in ("waited", "read", "ran", "said"):
            seconds = getattr(after, f"{what}_s") - getattr(before, f"{what}_s")
            lines.append((f"compiled: {what}", f"{frames / (repeats + 1):.1f}", f"{seconds / frames * 1e6:.1f}"))
    return lines


def _calls(profiler: cProfile.Profile) -> list[Call]:
    entries: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    return [(own, number, file, name) for (file, _, name), (_, number, own, *_) in entries.items()]


def _costliest(calls: Sequence[Call], repeats: int) -> list[tuple[str, str, str]]:
    of_python = sum(number for _, number, file, _ in calls if file != "~")
    lines = [("all functions of Python", f"{of_python / repeats:.1f}", "")]
    for own, number, file, name in sorted(calls, reverse=True)[:MOST_LINES]:
        where = name if file == "~" else f"{os.path.basename(file)} {name}"
        lines.append((where, f"{number / repeats:.1f}", f"{own / repeats * 1e6:.1f}"))
    return lines


def _draw(results: Sequence[Mapping[str, Any]], hidden: int, dtype: str, file: Path) -> None:
    """Cost over rows, a line per transport and number of groups. Raises ConfigError when it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, groups in dict.fromkeys((r["transport"], r["groups"]) for r in results):
        chosen = [r for r in results if (r["transport"], r["groups"]) == (name, groups)]
        axes.plot([r["rows"] for r in chosen], [r["p50_us"] for r in chosen], "o-", label=f"{name}, {groups} groups")
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="µs, median", title=f"hidden {hidden}, {dtype}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
