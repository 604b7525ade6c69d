"""The processes of a fleet, where they are and how well. Knows who could serve; knows no request.

A replica is well when its process runs, is not much slower than others, is known to those who ask it, and nothing is
wrong with its node; it counts once that has been so for a while. The fleet can serve while each group has one such
replica, and there is one such coordinator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from cluster.config import CoordinatorScalingConfig, ScalingConfig
from cluster.expert_deployments import expert_deployment_name
from cluster.simulation.coordinator import Coordinator, EngineCosts, EngineObserver
from cluster.simulation.gateway import APPLICATION, Arrival, ClientObserver, Gateway
from cluster.simulation.shards import Shard, ShardCosts
from cluster.simulation.world.events import EventQueue
from cluster.simulation.world.network import Network
from cluster.simulation.world.processes import Process
from experts_service.routing_table import Deployment, Replica

RECOVERY_S = 12.0  # after which a fault is over for whoever it hit: the longest pause between two dials, and a probe
HEAD = "head"
RACKS = 3


def rack_of(node: str) -> int:
    """Every third node is in the same one."""
    return int(node.removeprefix("node")) % RACKS


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """How large a fleet is, and what its steps cost."""

    groups: int = 2
    nodes: int = 4
    slots: int = 4  # of a node: shards or coordinators
    gateways: int = 1
    experts: ScalingConfig = field(default_factory=lambda: ScalingConfig(min_replicas=2, max_replicas=2))
    coordinators: CoordinatorScalingConfig = field(
        default_factory=lambda: CoordinatorScalingConfig(min_replicas=2, max_replicas=2)
    )
    engine: EngineCosts = field(default_factory=EngineCosts)
    shard: ShardCosts = field(default_factory=ShardCosts)
    popularity: tuple[float, ...] = ()  # of each group; empty: alike
    latency_s: float = 0.0003
    clocks_apart_s: float = 0.0
    promises_deadlines: bool = True  # whether there is room for all, so that a deadline is only missed for a fault
    checks_blocks: bool = True  # after every step


@dataclass(slots=True)
class ExpertReplica:
    """What Serve calls one: a supervisor, and the shard that it has started."""

    replica: Replica
    supervisor: Process
    shard: Shard | None = None  # that lives and has loaded
    shard_process: Process | None = None
    is_published: bool = False
    is_leaving: bool = False
    well_since: float | None = None
    seen_busy_s: float = 0.0
    seen_frames: int = 0
    seen_queue_s: float = 0.0
    loads: list[tuple[float, float]] = field(default_factory=list)  # busy fraction and queue, of the last seconds

    @property
    def processes(self) -> list[Process]:
        return [self.supervisor] + ([] if self.shard_process is None else [self.shard_process])


class Observer(EngineObserver, ClientObserver, Protocol):
    """Is told of everything that counts."""


class Fleet:
    """All processes by name."""

    def __init__(self, queue: EventQueue, spec: FleetSpec, observer: Observer) -> None:
        self.queue = queue
        self.spec = spec
        self.network = Network(queue, spec.latency_s)
        self.observer = observer
        self.deployments = {g: Deployment(APPLICATION, expert_deployment_name(g)) for g in range(spec.groups)}
        self.popularity = spec.popularity or (1.0 / spec.groups,) * spec.groups
        self.replicas: dict[str, ExpertReplica] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.gateways: dict[str, Gateway] = {}
        self.published_coordinators: set[str] = set()
        self.nodes: dict[str, None] = dict.fromkeys(f"node{n}" for n in range(spec.nodes))
        self.ill_nodes: Counter[str] = Counter()  # by how many faults
        self.dead_nodes: set[str] = set()
        self.stragglers: set[Process] = set()  # much slower than others
        self.controller = Process(queue, "controller", HEAD)
        self.stopped_at: dict[Process, float] = {}  # when a process went on again
        self.updates_late_s = 0.0  # what Serve's controller tells routers
        self.is_dirty = True
        self.clients_of: dict[str, str] = {}  # request → its gateway
        self._coordinator_well: dict[str, float | None] = {}
        self._is_served = True
        self._unserved_at = -inf  # last seen
        self._recovered_at = inf  # when whoever recovers may count
        self._number = 0

    # Who is there

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def new_process(self, name: str, node: str) -> Process:
        apart = self.spec.clocks_apart_s
        offset_s = self.queue.chance(f"clock/{name}").uniform(1000.0, 1000.0 + apart) if apart else 0.0
        process = Process(self.queue, name, node, offset_s)
        process.on_death.append(self.note_change)
        return process

    def of_group(self, group: int) -> list[ExpertReplica]:
        return [one for one in self.replicas.values() if one.replica.group == group]

    def shard_of(self, replica: Replica) -> Shard | None:
        """The present incarnation."""
        one = self.replicas.get(replica.replica_id)
        return None if one is None or one.shard is None or not one.shard.process.is_alive else one.shard

    def coordinator(self, name: str) -> Coordinator | None:
        one = self.coordinators.get(name)
        return one if one is not None and one.process.is_alive else None

    def place(self, avoided: Iterable[str]) -> str | None:
        """The node with the most room, one that has none of the same group first."""
        avoided = set(avoided)
        used = Counter(one.supervisor.node for one in self.replicas.values() if one.supervisor.is_alive)
        used.update(c.process.node for c in self.coordinators.values() if c.process.is_alive)
        free = {node: self.spec.slots - used[node] for node in self.nodes if node not in self.dead_nodes}
        best = max(free, key=lambda node: (free[node] > 0, node not in avoided, free[node]), default=None)
        return best if best is not None and free[best] > 0 else None

    # How well they are

    def note_change(self) -> None:
        """Somebody may be well now, or not any more."""
        self.is_dirty = True
        self.queue.look_from = -inf

    def set_ill(self, node: str, ill: bool) -> None:
        self.ill_nodes[node] += 1 if ill else -1
        self.note_change()

    def can_serve(self, without: Iterable[Process] = (), without_nodes: Iterable[str] = ()) -> bool:
        """Whether each group has a replica that counts, and there is a coordinator, though these are gone."""
        gone, nodes = set(without), set(without_nodes)
        now = self.queue.now
        if not any(
            self._counts(self._coordinator_well.get(name), now)
            and coordinator.process not in gone
            and coordinator.process.node not in nodes
            for name, coordinator in self.coordinators.items()
        ):
            return False
        served = {
            one.replica.group
            for one in self.replicas.values()
            if self._counts(one.well_since, now)
            and one.supervisor.node not in nodes
            and not any(process in gone for process in one.processes)
        }
        return len(served) == self.spec.groups

    def healthy_for(self, replica_id: str) -> float:
        """Seconds, 0 where it is not."""
        one = self.replicas.get(replica_id)
        return 0.0 if one is None or one.well_since is None else self.queue.now - one.well_since

    def was_served(self, since: float) -> bool:
        """Whether the fleet could serve all the time since then."""
        self.note_service()
        return self._is_served and self._unserved_at < since

    def can_answer(self, request: str, later: bool = False) -> bool:
        """Whether the gateway of that request can; `later`: or could, if it is stopped and goes on."""
        gateway = self.gateways.get(self.clients_of.get(request, ""))
        return gateway is not None and (gateway.process.is_alive if later else gateway.process.runs)

    @property
    def news_from(self) -> float:
        """The moment from which `note_service` has something to note, as long as nothing changes."""
        return -inf if self.is_dirty or not self._is_served else self._recovered_at

    def note_service(self) -> None:
        """At every event, from the moment `news_from` on."""
        now = self.queue.now
        if not self.is_dirty and now < self._recovered_at:
            if not self._is_served:
                self._unserved_at = now
            return
        self.is_dirty = False
        self._recovered_at = inf
        for one in self.replicas.values():
            self._note_well(one, self._is_well_replica(one))
        for name, coordinator in self.coordinators.items():
            process = coordinator.process
            is_well = name in self.published_coordinators and self._is_well(process)
            before = self._coordinator_well.get(name)
            self._coordinator_well[name] = (now if before is None else before) if is_well else None
            self._note_recovery(self._coordinator_well[name])
        self._is_served = self.can_serve()
        if not self._is_served:
            self._unserved_at = now

    def begin(self) -> None:
        """All who are there have been there for long."""
        self.note_service()
        for one in self.replicas.values():
            one.well_since = -1e9
        for name in self.coordinators:
            self._coordinator_well[name] = -1e9
        self._is_served, self._unserved_at = True, -inf
        self.note_change()

    def send_arrival(self, arrival: Arrival) -> None:
        """To one of the gateways that live, in turn."""
        names = [name for name, gateway in self.gateways.items() if gateway.process.runs]
        if names:
            name = names[self.next_number() % len(names)]
            self.clients_of[arrival.name] = name
            self.gateways[name].take(arrival)

    def _note_well(self, one: ExpertReplica, is_well: bool) -> None:
        if not is_well:
            one.well_since = None
        elif one.well_since is None:
            one.well_since = self.queue.now
        self._note_recovery(one.well_since)

    def _note_recovery(self, well_since: float | None) -> None:
        if well_since is not None and self.queue.now < well_since + RECOVERY_S:
            self._recovered_at = min(self._recovered_at, well_since + RECOVERY_S)

    def _is_well(self, process: Process) -> bool:
        return (
            process.runs
            and process not in self.stragglers
            and not self.ill_nodes[process.node]
            and process.node not in self.dead_nodes
        )

    def _is_well_replica(self, one: ExpertReplica) -> bool:
        return (
            one.is_published
            and not one.is_leaving
            and one.shard is not None
            and one.shard.is_finite
            and not one.shard.raises
            and one.supervisor.runs
            and self._is_well(one.shard.process)
        )

    @staticmethod
    def _counts(well_since: float | None, now: float) -> bool:
        return well_since is not None and now >= well_since + RECOVERY_S
