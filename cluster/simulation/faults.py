"""What can go wrong, when, and to whom. Knows processes, nodes and racks; a fault that leaves nobody may be left out.

A fault names its victim by a number, which stands for one of those that there are when it comes. So it means something
in every run, whichever other faults are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar, get_args

from cluster.simulation.members import HEAD, ExpertReplica, Fleet, rack_of
from cluster.simulation.world.processes import Process

Kind = Literal[
    "kill shard",
    "kill supervisor",
    "kill coordinator",
    "kill gateway",
    "kill node",
    "kill many shards",
    "stop shard",
    "stop coordinator",
    "stop gateway",
    "slow shard",
    "slow coordinator",
    "slow all shards",
    "cut off node",
    "cut off one way",
    "cut the streams",
    "lose packets",
    "delay packets",
    "answers not finite",
    "maths raises",
    "kill rack",
    "cut off rack",
    "cut the lanes",
    "late updates",
    "late calls",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHTS = dict(zip(KINDS, (8, 4, 5, 1, 2, 2, 4, 3, 1, 4, 2, 2, 2, 3, 3, 2, 2, 4, 1, 1, 1, 3, 2, 2), strict=True))
LATER_KINDS = KINDS[KINDS.index("kill rack") :]  # drawn by themselves: a seed that has found something stays what it is
FIRST_KINDS = KINDS[: -len(LATER_KINDS)]

MOST_LATE_S = 8.0  # that an update of Serve's is; less than what whoever comes back is given
MUCH_SLOWER = 3.0  # times as long as usual: no replica that anybody could count on

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    at: float
    kind: Kind
    victim: int
    seconds: float  # until it is over, if it is
    amount: float  # 0 … 1: how bad

    def __str__(self) -> str:
        return f"{self.at:12.6f}  {self.kind}, number {self.victim}, for {self.seconds:.1f} s, {self.amount:.2f} bad"


def draw(chance: Random, number: int, until: float, kinds: Sequence[Kind] = FIRST_KINDS) -> list[Fault]:
    """So many faults, in the order in which they come."""
    weights = [WEIGHTS[kind] for kind in kinds]
    faults = [
        Fault(
            at=round(chance.uniform(2.0, until), 3),
            kind=chance.choices(kinds, weights)[0],
            victim=chance.randrange(1000),
            seconds=round(chance.choice([0.3, 2.0, 8.0, 20.0, 50.0]) * chance.uniform(0.5, 1.5), 3),
            amount=round(chance.random(), 3),
        )
        for _ in range(number)
    ]
    return sorted(faults, key=lambda fault: fault.at)


class Faults:
    """Has them happen to a fleet."""

    def __init__(self, fleet: Fleet, on_mass_death: Callable[[int], object], *, gently: bool) -> None:
        """`gently`: one that would leave a group without a replica, or nobody to coordinate, is left out."""
        self._on_mass_death = on_mass_death
        self._fleet = fleet
        self._gently = gently
        self.happened: list[tuple[float, str]] = []

    def happen(self, fault: Fault) -> None:
        getattr(self, "_" + fault.kind.replace(" ", "_"))(fault)

    # Shards

    def _kill_shard(self, fault: Fault) -> None:
        if (one := self._replica(fault)) is not None and one.shard is not None and self._may(fault, one.shard.process):
            one.shard.process.die()

    def _kill_supervisor(self, fault: Fault) -> None:
        if (one := self._replica(fault)) is not None and self._may(fault, *one.processes):
            one.supervisor.die()

    def _kill_many_shards(self, fault: Fault) -> None:
        """All but one of each group at most."""
        died = 0
        for group in self._fleet.deployments:
            here = [one for one in self._fleet.of_group(group) if one.shard is not None]
            for one in here[: max(1, round((0.4 + 0.6 * fault.amount) * len(here)))]:
                if one.shard is not None and self._may(fault, one.shard.process):
                    one.shard.process.die()
                    died += 1
        if died:
            self._on_mass_death(died)

    def _stop_shard(self, fault: Fault) -> None:
        if (one := self._replica(fault)) is not None and one.shard is not None and self._may(fault, one.shard.process):
            self._stop(one.shard.process, fault.seconds)

    def _slow_shard(self, fault: Fault) -> None:
        if (one := self._replica(fault)) is not None and one.shard is not None:
            self._slow(one.shard.process, fault)

    def _answers_not_finite(self, fault: Fault) -> None:
        if (one := self._replica(fault)) is None or (shard := one.shard) is None or not self._may(fault, shard.process):
            return
        shard.is_finite = False
        self._until(fault, lambda: setattr(shard, "is_finite", True))

    def _maths_raises(self, fault: Fault) -> None:
        """Which would raise elsewhere as well: whoever asks three times ends those rows. So it is not gentle."""
        if self._gently or (one := self._replica(fault)) is None or (shard := one.shard) is None:
            return
        self._may(fault, shard.process)
        shard.raises = True
        self._until(fault, lambda: setattr(shard, "raises", False))

    # Coordinators and gateways

    def _kill_coordinator(self, fault: Fault) -> None:
        if (process := self._coordinator(fault)) is not None and self._may(fault, process):
            process.die()

    def _stop_coordinator(self, fault: Fault) -> None:
        if (process := self._coordinator(fault)) is not None and self._may(fault, process):
            self._stop(process, fault.seconds)

    def _slow_coordinator(self, fault: Fault) -> None:
        if (process := self._coordinator(fault)) is not None:
            self._slow(process, fault)

    def _kill_gateway(self, fault: Fault) -> None:
        if (process := self._gateway(fault)) is not None and self._may(fault, process):
            process.die()

    def _stop_gateway(self, fault: Fault) -> None:
        if (process := self._gateway(fault)) is not None and self._may(fault, process):
            self._stop(process, min(fault.seconds, 10.0))

    def _cut_the_streams(self, fault: Fault) -> None:
        """All connections between a gateway and a coordinator break."""
        gateway, coordinator = self._gateway(fault), self._coordinator(fault)
        if gateway is None or coordinator is None:
            return
        self._note(fault, f"{gateway} and {coordinator}")
        for connection in self._fleet.network.between(gateway, coordinator):
            connection.break_off()

    def _cut_the_lanes(self, fault: Fault) -> None:
        """Those of a coordinator are reset: to one shard, or to all."""
        coordinator, one = self._coordinator(fault), self._replica(fault)
        if coordinator is None or one is None:
            return
        some = [one] if fault.amount < 0.5 else self._fleet.replicas.values()
        shards = [each.shard.process for each in some if each.shard is not None]
        self._note(fault, f"{coordinator} and {', '.join(map(str, shards))}")
        for shard in shards:
            for connection in self._fleet.network.between(coordinator, shard):
                connection.break_off()

    # Nodes, racks and the network

    def _kill_node(self, fault: Fault) -> None:
        if (node := self._node(fault)) is not None and self._may(fault, nodes=[node]):
            self._lose(node)

    def _kill_rack(self, fault: Fault) -> None:
        if (nodes := self._rack(fault)) and self._may(fault, nodes=nodes):
            for node in nodes:
                self._lose(node)

    def _lose(self, node: str) -> None:
        fleet = self._fleet
        fleet.dead_nodes.add(node)
        for other in [*fleet.nodes, HEAD]:
            if other != node:
                fleet.network.block(node, other)
                fleet.network.block(other, node)
        for process in self._on(node):
            process.die()
        fleet.note_change()

    def _cut_off_node(self, fault: Fault) -> None:
        if (node := self._node(fault)) is not None and self._may(fault, nodes=[node]):
            self._cut_off(fault, [node], inwards=True, outwards=True)

    def _cut_off_one_way(self, fault: Fault) -> None:
        if (node := self._node(fault)) is not None and self._may(fault, nodes=[node]):
            self._cut_off(fault, [node], inwards=fault.amount < 0.5, outwards=fault.amount >= 0.5)

    def _cut_off_rack(self, fault: Fault) -> None:
        """Its nodes still reach each other."""
        if (nodes := self._rack(fault)) and self._may(fault, nodes=nodes):
            self._cut_off(fault, nodes, inwards=True, outwards=True)

    def _lose_packets(self, fault: Fault) -> None:
        if (node := self._node(fault)) is None:
            return
        loss, network = 0.3 * fault.amount, self._fleet.network
        if loss > 0.1 and not self._may(fault, nodes=[node]):
            return
        self._note(fault, node)
        network.loss[node] = loss
        self._until(fault, lambda: network.loss.pop(node, None), ill=[node] if loss > 0.1 else [])

    def _delay_packets(self, fault: Fault) -> None:
        if (node := self._node(fault)) is None or not self._may(fault, nodes=[node]):
            return
        network = self._fleet.network
        network.extra_s[node] = fault.amount
        self._until(fault, lambda: network.extra_s.pop(node, None), ill=[node])

    def _late_updates(self, fault: Fault) -> None:
        """Serve's controller is slow: routers hear late of who came and who left."""
        fleet, late_s = self._fleet, MOST_LATE_S * fault.amount
        self._note(fault, f"{late_s:.1f} s")
        fleet.updates_late_s += late_s
        self._until(fault, lambda: setattr(fleet, "updates_late_s", max(0.0, fleet.updates_late_s - late_s)))

    def _late_calls(self, fault: Fault) -> None:
        """Calls of actors overtake each other."""
        network, late_s = self._fleet.network, fault.amount
        self._note(fault, f"{late_s:.1f} s")
        network.calls_late_s += late_s
        self._until(fault, lambda: setattr(network, "calls_late_s", max(0.0, network.calls_late_s - late_s)))

    def _cut_off(self, fault: Fault, nodes: Sequence[str], *, inwards: bool, outwards: bool) -> None:
        network = self._fleet.network
        ways = [
            way
            for node in nodes
            for other in [*self._fleet.nodes, HEAD]
            if other not in nodes
            for way in ([(other, node)] if inwards else []) + ([(node, other)] if outwards else [])
        ]
        for way in ways:
            network.block(*way)

        def end() -> None:
            for way in ways:
                network.unblock(*way)

        self._until(fault, end, ill=nodes)

    # Whom

    def _replica(self, fault: Fault) -> ExpertReplica | None:
        return _nth([one for one in self._fleet.replicas.values() if one.supervisor.is_alive], fault.victim)

    def _coordinator(self, fault: Fault) -> Process | None:
        return _nth([c.process for c in self._fleet.coordinators.values() if c.process.is_alive], fault.victim)

    def _gateway(self, fault: Fault) -> Process | None:
        return _nth([g.process for g in self._fleet.gateways.values() if g.process.is_alive], fault.victim)

    def _node(self, fault: Fault) -> str | None:
        """Not one that a gateway is on: its clients would be cut off with it."""
        gateways = {g.process.node for g in self._fleet.gateways.values()} if self._gently else set()
        return _nth(
            [node for node in self._fleet.nodes if node not in self._fleet.dead_nodes and node not in gateways],
            fault.victim,
        )

    def _rack(self, fault: Fault) -> list[str]:
        """The nodes of the rack of one; none where one of them is not to be hit."""
        node, fleet = self._node(fault), self._fleet
        if node is None:
            return []
        nodes = [each for each in fleet.nodes if each not in fleet.dead_nodes and rack_of(each) == rack_of(node)]
        gateways = {g.process.node for g in fleet.gateways.values()} if self._gently else set()
        return [] if gateways & set(nodes) else nodes

    def _on(self, node: str) -> list[Process]:
        fleet = self._fleet
        processes = [process for one in fleet.replicas.values() for process in one.processes]
        processes += [c.process for c in fleet.coordinators.values()]
        processes += [g.process for g in fleet.gateways.values()]
        return [process for process in processes if process.node == node and process.is_alive]

    # How

    def _may(self, fault: Fault, *processes: Process, nodes: Iterable[str] = ()) -> bool:
        fleet = self._fleet
        fleet.note_service()
        if self._gently and not fleet.can_serve(processes, nodes):
            return False
        self._note(fault, ", ".join([*map(str, processes), *nodes]))
        fleet.note_change()
        return True

    def _stop(self, process: Process, seconds: float) -> None:
        fleet = self._fleet
        process.stop()
        fleet.note_change()

        def go_on() -> None:
            if process.is_alive:
                fleet.stopped_at[process] = fleet.queue.now
                process.go_on()
                fleet.note_change()

        fleet.queue.after(seconds, go_on)

    def _slow(self, process: Process, fault: Fault) -> None:
        slowness = 1.5 + 20 * fault.amount**3
        is_straggler = slowness > MUCH_SLOWER
        if is_straggler and not self._may(fault, process):
            return
        self._note(fault, f"{process}, {slowness:.1f} times")
        process.slowness = slowness
        if is_straggler:
            self._fleet.stragglers.add(process)

        def end() -> None:
            process.slowness = 1.0
            self._fleet.stragglers.discard(process)

        self._until(fault, end)

    def _slow_all_shards(self, fault: Fault) -> None:
        """Alike, so that nobody is a straggler: a neighbour of theirs takes their cores."""
        slowed = [one.shard.process for one in self._fleet.replicas.values() if one.shard is not None]
        slowness = 2 + 8 * fault.amount
        self._note(fault, f"{slowness:.1f} times")
        for process in slowed:
            process.slowness *= slowness

        def end() -> None:
            for process in slowed:
                process.slowness = max(1.0, process.slowness / slowness)

        self._until(fault, end)

    def _until(self, fault: Fault, end: Callable[[], object], ill: Sequence[str] = ()) -> None:
        """Have it end, and whoever is well again be seen to be. `ill`: nodes that are not, until then."""
        fleet = self._fleet
        for node in ill:
            fleet.set_ill(node, True)

        def over() -> None:
            end()
            for node in ill:
                fleet.set_ill(node, False)
            fleet.note_change()

        fleet.note_change()
        fleet.queue.after(fault.seconds, over)

    def _note(self, fault: Fault, whom: str) -> None:
        self.happened.append((self._fleet.queue.now, f"{fault.kind}: {whom} for {fault.seconds:.1f} s"))


def _nth(some: Sequence[_T], number: int) -> _T | None:
    return some[number % len(some)] if some else None
