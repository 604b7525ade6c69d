"""Serve's controller and Ray's autoscaler, as far as a fleet feels them: who is listed, replaced, added, taken away.

Delays are those that were measured of Ray 2.60, or said in its source: a dead actor is noticed within two seconds where
its health is asked for every second, a silent one after three questions of ten seconds, a node that is gone after 15 to
55. The scaling policies are the product's; how long a decision has to last before it counts is Serve's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.expert_deployments import expert_deployment_name
from cluster.planning.scaling_policy import LOOK_BACK_S, REPORT_INTERVAL_S
from cluster.simulation.coordinator import Coordinator
from cluster.simulation.gateway import APPLICATION, Gateway
from cluster.simulation.members import ExpertReplica, Fleet
from cluster.simulation.scaling import Averages, Scaling
from cluster.simulation.shards import Shard
from cluster.simulation.world.network import Connection
from cluster.simulation.world.processes import Process
from experts_service.routing_table import Replica

NOTICE_S = (0.5, 2.0)  # until a dead actor is noticed,
SILENT_S = 33.0  # one that does not answer,
NODE_GONE_S = (15.0, 55.0)  # and a node
START_S = (1.0, 3.0)  # of a process, before it loads
RESTART_S = (0.5, 2.0)  # of a shard by Ray, before it loads
PUBLISH_S = (0.02, 0.3)  # until routers are told
NODE_START_S = (20.0, 60.0)  # of a new node
LEAVING_S, DRAIN_S = 10.0, 5.0  # as `experts_service.service` has them
COORDINATOR_LOAD_S = 3.0
CALL_FAILS_S = 0.018  # of an actor that has died


OnLoad = Callable[[Scaling, Averages], object]
OnScaled = Callable[[Scaling, int, Averages], object]


class Serve:
    """Keeps as many replicas of everything as there should be."""

    def __init__(self, fleet: Fleet, on_scaled: OnScaled = lambda *_: None, on_load: OnLoad = lambda *_: None) -> None:
        """`on_scaled` is called before a deployment's number changes: with what it was, the new number, and the
        averages of load and waiting that each replica has reported. `on_load`: with those, every second.
        """
        self.fleet = fleet
        self._on_load = on_load
        self._on_scaled = on_scaled
        self.queue = fleet.queue
        self._chance = fleet.queue.chance("serve")
        spec = fleet.spec
        self.experts = {group: Scaling(APPLICATION, one.name, spec.experts) for group, one in fleet.deployments.items()}
        self.coordinators = Scaling(APPLICATION, "coordinator", spec.coordinators)
        self.num_scaled = 0
        self._pending_nodes = 0
        self._coordinator_loads: dict[str, list[tuple[float, float]]] = {}
        self._silent_since: dict[Process, float] = {}
        self._ways: dict[Process, Connection] = {}  # to those who are told of changes,
        self._told_at: dict[Process, float] = {}  # and when each was told last

    def start(self) -> None:
        """Everything is up at once."""
        fleet = self.fleet
        for group, scaling in self.experts.items():
            for _ in range(scaling.target):
                self._add_replica(group, at_once=True)
        for _ in range(self.coordinators.target):
            self._add_coordinator(at_once=True)
        for number in range(fleet.spec.gateways):
            self._add_gateway(number)
        for group in fleet.deployments:
            self._publish(group, at_once=True)
        self._publish_coordinators(at_once=True)
        for coordinator in fleet.coordinators.values():
            for one in fleet.replicas.values():
                if one.shard is not None:
                    coordinator.lanes.connect_at_once(one.replica, one.shard)
        fleet.begin()
        self.queue.after(REPORT_INTERVAL_S, self._look)

    # Replicas of groups

    def _add_replica(self, group: int, *, at_once: bool = False) -> None:
        fleet = self.fleet
        node = fleet.place(one.supervisor.node for one in fleet.of_group(group) if one.supervisor.is_alive)
        if node is None:
            if not self._pending_nodes:
                self._pending_nodes += 1
                self.queue.after(self._between(NODE_START_S), self._node_comes)
            self.queue.after(1.0, self._want_replica, group)
            return
        name = f"{expert_deployment_name(group)}#{fleet.next_number()}"
        supervisor = fleet.new_process(f"{name}/supervisor", node)
        replica = Replica(name, name, "manta", group, "f", expert_deployment_name(group))
        one = fleet.replicas[name] = ExpertReplica(replica, supervisor)
        supervisor.on_death.append(lambda: self._supervisor_died(one))
        if at_once:
            self._start_shard(one)
            one.is_published = True
        else:
            self.queue.after(self._between(START_S) + fleet.spec.shard.load_s, self._replica_ready, one)

    def _want_replica(self, group: int) -> None:
        wanted = self.experts[group].target
        if sum(one.supervisor.is_alive and not one.is_leaving for one in self.fleet.of_group(group)) < wanted:
            self._add_replica(group)

    def _replica_ready(self, one: ExpertReplica) -> None:
        if one.supervisor.is_alive:
            self._start_shard(one)
            one.is_published = True
            self.fleet.note_change()
            self._publish(one.replica.group)

    def _start_shard(self, one: ExpertReplica) -> None:
        fleet = self.fleet
        process = fleet.new_process(f"{one.replica.replica_id}/shard{fleet.next_number()}", one.supervisor.node)
        one.shard_process = process
        one.shard = Shard(process, one.replica.group, fleet.spec.shard)
        one.seen_busy_s = one.seen_queue_s = 0.0
        one.seen_frames = 0
        process.on_death.append(lambda: self._shard_died(one, process))
        fleet.note_change()

    def _shard_died(self, one: ExpertReplica, process: Process) -> None:
        if one.shard_process is process:
            one.shard = None
            if one.supervisor.is_alive and not one.is_leaving:
                seconds = self._between(RESTART_S) + self.fleet.spec.shard.load_s
                self.queue.after(seconds, self._shard_back, one)

    def _shard_back(self, one: ExpertReplica) -> None:
        """A new incarnation has loaded; the supervisor sees it within a second, and tells the coordinators."""
        if one.supervisor.is_alive and one.shard is None and not one.is_leaving:
            self._start_shard(one)
            one.supervisor.after(self._between((0.0, REPORT_INTERVAL_S)), self._announce, one)

    def _announce(self, one: ExpertReplica) -> None:
        fleet, deployment = self.fleet, self.fleet.deployments[one.replica.group]
        for coordinator in fleet.coordinators.values():
            fleet.network.send(
                one.supervisor, coordinator.process, coordinator.table.trust, deployment, one.replica.replica_id
            )

    def _supervisor_died(self, one: ExpertReplica) -> None:
        """Its shard goes with it; Serve hears of it later."""
        if one.shard_process is not None:
            one.shard_process.die()
        if not one.is_leaving:
            self.queue.after(self._notice_s(one.supervisor), self._replace, one)

    def _replace(self, one: ExpertReplica) -> None:
        group = one.replica.group
        self.fleet.replicas.pop(one.replica.replica_id, None)
        one.is_published = False
        self._publish(group)
        self._want_replica(group)

    def _publish(self, group: int, *, at_once: bool = False) -> None:
        fleet = self.fleet
        listed = [one.replica for one in fleet.of_group(group) if one.is_published and not one.is_leaving]
        deployment = fleet.deployments[group]
        for coordinator in fleet.coordinators.values():
            if at_once:
                coordinator.table.publish_tier(deployment, deployment.name, listed)
            else:
                self._tell(coordinator.process, coordinator.table.publish_tier, deployment, deployment.name, listed)
        fleet.note_change()

    def _tell(self, router: Process, action: Callable[..., object], *arguments: Any) -> None:
        """A router is told, one thing after the other: it asks for the next once it has heard of the last."""
        fleet, now = self.fleet, self.queue.now
        way = self._ways.get(router)
        if way is None:
            way = self._ways[router] = fleet.network.connect(fleet.controller, router)
            router.on_death.append(lambda: self._ways.pop(router))
        at = now + self._between(PUBLISH_S) + fleet.updates_late_s
        at = self._told_at[router] = max(at, self._told_at.get(router, 0.0))
        self.queue.at(at, way.send, fleet.controller, action, *arguments)

    def _take_away(self, group: int) -> None:
        """The newest replica leaves: coordinators first, then what is in flight, then it."""
        here = [one for one in self.fleet.of_group(group) if one.supervisor.is_alive and not one.is_leaving]
        if not here:
            return
        one = here[-1]
        one.is_leaving = True
        self._publish(group)
        self.queue.after(self._between((1.0, LEAVING_S)), self._drain, one)

    def _drain(self, one: ExpertReplica) -> None:
        if one.shard is not None:
            one.shard.is_draining = True
        self.queue.after(0.5, self._end_when_idle, one, self.queue.now + DRAIN_S)

    def _end_when_idle(self, one: ExpertReplica, until: float) -> None:
        if one.shard is not None and not one.shard.is_idle and self.queue.now < until:
            self.queue.after(0.5, self._end_when_idle, one, until)
            return
        one.supervisor.die()
        self.fleet.replicas.pop(one.replica.replica_id, None)

    # Coordinators and gateways

    def _add_coordinator(self, *, at_once: bool = False) -> None:
        fleet = self.fleet
        node = fleet.place(c.process.node for c in fleet.coordinators.values())
        if node is None:
            self.queue.after(1.0, self._want_coordinator)
            if not self._pending_nodes:
                self._pending_nodes += 1
                self.queue.after(self._between(NODE_START_S), self._node_comes)
            return
        process = fleet.new_process(f"coordinator#{fleet.next_number()}", node)
        coordinator = Coordinator(
            process, fleet.spec.engine, fleet.deployments, fleet.network, fleet.shard_of, fleet.popularity,
            fleet.observer,
        )  # fmt: skip
        fleet.coordinators[process.name] = coordinator
        process.on_death.append(lambda: self.queue.after(self._notice_s(process), self._replace_coordinator, process))
        for group, deployment in fleet.deployments.items():
            listed = [one.replica for one in fleet.of_group(group) if one.is_published and not one.is_leaving]
            coordinator.table.publish_tier(deployment, deployment.name, listed)
        if not at_once:
            self.queue.after(self._between(START_S) + COORDINATOR_LOAD_S, self._publish_coordinator, process)
        else:
            fleet.published_coordinators.add(process.name)

    def _want_coordinator(self) -> None:
        if sum(c.process.is_alive for c in self.fleet.coordinators.values()) < self.coordinators.target:
            self._add_coordinator()

    def _publish_coordinator(self, process: Process) -> None:
        if process.is_alive:
            self.fleet.published_coordinators.add(process.name)
            self._publish_coordinators()

    def _replace_coordinator(self, process: Process) -> None:
        fleet = self.fleet
        fleet.coordinators.pop(process.name, None)
        fleet.published_coordinators.discard(process.name)
        self._publish_coordinators()
        self._want_coordinator()

    def _publish_coordinators(self, *, at_once: bool = False) -> None:
        fleet = self.fleet
        listed = sorted(fleet.published_coordinators)
        for gateway in fleet.gateways.values():
            if at_once:
                gateway.process.do(gateway.table.publish, APPLICATION, listed)
            else:
                self._tell(gateway.process, gateway.table.publish, APPLICATION, listed)
        fleet.note_change()

    def _add_gateway(self, number: int) -> None:
        fleet = self.fleet
        nodes = list(fleet.nodes)
        process = fleet.new_process(f"gateway#{fleet.next_number()}", nodes[number % len(nodes)])
        fleet.gateways[process.name] = self._gateway(process)
        process.on_death.append(lambda: self.queue.after(self._notice_s(process), self._replace_gateway, process))

    def _gateway(self, process: Process) -> Gateway:
        fleet = self.fleet
        return Gateway(process, fleet.network, fleet.coordinator, fleet.observer, self._called_notice_s)

    def _called_notice_s(self, coordinator: str) -> float:
        """Until a call of a dead one fails: with its node, when Ray has missed that."""
        one = self.fleet.coordinators.get(coordinator)
        lost = one is not None and one.process.node in self.fleet.dead_nodes
        return self._between(NODE_GONE_S) if lost else CALL_FAILS_S

    def _replace_gateway(self, process: Process) -> None:
        fleet = self.fleet
        fleet.gateways.pop(process.name, None)
        nodes = [node for node in fleet.nodes if node not in fleet.dead_nodes]
        if not nodes:  # one comes for the experts
            self.queue.after(1.0, self._replace_gateway, process)
            return
        fresh = fleet.new_process(f"gateway#{fleet.next_number()}", nodes[0])
        fleet.gateways[fresh.name] = self._gateway(fresh)
        fresh.on_death.append(lambda: self.queue.after(self._notice_s(fresh), self._replace_gateway, fresh))
        self._publish_coordinators()

    # Every second

    def _look(self) -> None:
        self.queue.after(REPORT_INTERVAL_S, self._look)
        self._look_for_silence()
        for group, scaling in self.experts.items():
            if not scaling.is_fixed:
                for one in self.fleet.of_group(group):
                    self._note_load(one)
                self._scale_experts(group, scaling)
        if not self.coordinators.is_fixed:
            self._scale_coordinators()

    def _look_for_silence(self) -> None:
        """What does not answer the controller for three questions is killed."""
        fleet, now = self.fleet, self.queue.now
        network, head = fleet.network, fleet.controller.node
        asked: list[Process] = [one.supervisor for one in fleet.replicas.values()]
        asked += [c.process for c in fleet.coordinators.values()]
        asked += [g.process for g in fleet.gateways.values()]
        cut_off = {node for node in fleet.nodes if network.is_blocked(head, node) or network.is_blocked(node, head)}
        for process in asked:
            if process.is_alive and (process.is_stopped or process.node in cut_off):
                since = self._silent_since.setdefault(process, now)
                if now - since >= SILENT_S:
                    process.die()
            elif self._silent_since:
                self._silent_since.pop(process, None)

    def _note_load(self, one: ExpertReplica) -> None:
        shard = one.shard
        if shard is None or not one.supervisor.runs:
            return
        busy_s = shard.busy_s - one.seen_busy_s
        frames, queue_s = shard.num_frames - one.seen_frames, shard.queue_s - one.seen_queue_s
        one.seen_busy_s, one.seen_frames, one.seen_queue_s = shard.busy_s, shard.num_frames, shard.queue_s
        busy = min(1.0, busy_s / REPORT_INTERVAL_S)
        one.loads = [*one.loads, (busy, queue_s / frames if frames else 0.0)][-int(LOOK_BACK_S / REPORT_INTERVAL_S) :]

    def _scale_experts(self, group: int, scaling: Scaling) -> None:
        running = [
            one for one in self.fleet.of_group(group)
            if one.is_published and not one.is_leaving and one.supervisor.is_alive
        ]  # fmt: skip
        loads = {one.replica.replica_id: one.loads for one in running if one.loads}
        before = scaling.target
        self._decide(scaling, len(running), loads)
        for _ in range(before, scaling.target):
            self._add_replica(group)
        for _ in range(scaling.target, before):
            self._take_away(group)

    def _scale_coordinators(self) -> None:
        fleet = self.fleet
        running = [c for name, c in fleet.coordinators.items() if name in fleet.published_coordinators]
        for coordinator in running:
            recent = self._coordinator_loads.setdefault(coordinator.process.name, [])
            recent.append((coordinator.used_fraction(), float(coordinator.num_waiting())))
            del recent[: -int(LOOK_BACK_S / REPORT_INTERVAL_S)]
        loads = {c.process.name: self._coordinator_loads[c.process.name] for c in running}
        before = self.coordinators.target
        self._decide(self.coordinators, len(running), loads)
        for _ in range(before, self.coordinators.target):
            self._add_coordinator()
        for _ in range(self.coordinators.target, before):
            self._take_coordinator_away()

    def _take_coordinator_away(self) -> None:
        """The newest takes no more requests, and ends when it has none left."""
        fleet = self.fleet
        name = [name for name in fleet.coordinators if name in fleet.published_coordinators][-1]
        fleet.published_coordinators.discard(name)
        self._publish_coordinators()
        self.queue.after(2.0, self._end_coordinator, fleet.coordinators[name])

    def _end_coordinator(self, coordinator: Coordinator) -> None:
        if coordinator.process.is_alive and not coordinator.is_idle:
            self.queue.after(1.0, self._end_coordinator, coordinator)
            return
        self.fleet.coordinators.pop(coordinator.process.name, None)
        coordinator.process.on_death = [coordinator.lanes.close]
        coordinator.process.die()

    def _decide(self, scaling: Scaling, current: int, loads: Mapping[str, list[tuple[float, float]]]) -> None:
        averages = {who: tuple(sum(one) / len(seen) for one in zip(*seen, strict=True)) for who, seen in loads.items()}
        self._on_load(scaling, averages)
        wanted = scaling.wanted(current, averages, self.queue.now)
        if wanted != scaling.target:
            self.num_scaled += 1
            self._on_scaled(scaling, wanted, averages)
            scaling.change(wanted, self.queue.now)

    def _node_comes(self) -> None:
        self._pending_nodes -= 1
        self.fleet.nodes[f"node{self.fleet.next_number()}"] = None

    def _notice_s(self, process: Process) -> float:
        return self._between(NODE_GONE_S if process.node in self.fleet.dead_nodes else NOTICE_S)

    def _between(self, bounds: tuple[float, float]) -> float:
        return self._chance.uniform(*bounds)
