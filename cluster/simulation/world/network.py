"""The network between nodes: late, lossy, partitioned one way. Knows processes; knows nothing of what they send.

A connection is as TCP's: what is sent arrives once and in order, or not before the connection is lost. A lost packet is
sent again, and so late; while the way is blocked, everything waits, and arrives some time after that is over. A process
that dies closes its connections; a node that is gone closes none. Messages without a connection come in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.simulation.world.events import EventQueue
from cluster.simulation.world.processes import Process

RESEND_S = 0.2  # TCP's first, doubled from then on


class Network:
    """Ways from node to node, each in one direction."""

    def __init__(self, queue: EventQueue, latency_s: float) -> None:
        self._queue = queue
        self._chance = queue.chance("network")
        self._latency_s = latency_s
        self.blocked: dict[tuple[str, str], int] = {}  # (from, to) → by how many faults
        self.loss: dict[str, float] = {}  # of a node's packets, in and out
        self.extra_s: dict[str, float] = {}  # by node
        self.calls_late_s = 0.0  # at most, of messages by themselves
        self._lateness = queue.chance("network/late")
        self._waiting: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self._connections: dict[Process, dict[Connection, None]] = {}

    def is_blocked(self, source: str, target: str) -> bool:
        return source != target and self.blocked.get((source, target), 0) > 0

    def block(self, source: str, target: str) -> None:
        self.blocked[source, target] = self.blocked.get((source, target), 0) + 1

    def unblock(self, source: str, target: str) -> None:
        left = self.blocked[source, target] - 1
        if left:
            self.blocked[source, target] = left
            return
        del self.blocked[source, target]
        for send_again in self._waiting.pop((source, target), []):
            send_again()

    def delay_s(self, source: str, target: str) -> float:
        """Of one packet, with the times that it was lost."""
        delay_s = self._latency_s * (0.5 + self._chance.random())
        if source == target:
            return 0.1 * delay_s
        if self.extra_s:
            delay_s += self.extra_s.get(source, 0.0) + self.extra_s.get(target, 0.0)
        if self.loss:
            loss, again_s = max(self.loss.get(source, 0.0), self.loss.get(target, 0.0)), RESEND_S
            while self._chance.random() < loss:
                delay_s, again_s = delay_s + again_s, 2 * again_s
        return delay_s

    def send(self, source: Process, target: Process, action: Callable[..., object], *arguments: Any) -> None:
        """A message by itself, which arrives if its way is open now or later, and its target lives then."""
        if self.is_blocked(source.node, target.node):
            self._wait(source.node, target.node, lambda: self.send(source, target, action, *arguments))
        else:
            delay_s = self.delay_s(source.node, target.node)
            if self.calls_late_s:
                delay_s += self._lateness.uniform(0.0, self.calls_late_s)
            target.after(delay_s, action, *arguments)

    def connect(self, one: Process, other: Process) -> Connection:
        connection = Connection(self, one, other)
        for end in one, other:
            if end not in self._connections:
                self._connections[end] = {}
                end.on_death.append(lambda end=end: self._close_all(end))  # type: ignore[misc]
            self._connections[end][connection] = None
        return connection

    def forget(self, connection: Connection) -> None:
        """It is closed at both ends."""
        for end in connection.ends:
            self._connections.get(end, {}).pop(connection, None)

    def between(self, one: Process, other: Process) -> list[Connection]:
        """Their connections."""
        return [connection for connection in self._connections.get(one, ()) if other in connection.ends]

    def _close_all(self, process: Process) -> None:
        for connection in list(self._connections.pop(process)):
            connection.close(process)

    def _wait(self, source: str, target: str, send_again: Callable[[], None]) -> None:
        self._waiting.setdefault((source, target), []).append(send_again)


class Connection:
    """Between two processes. `on_close` of an end is called there when the other has closed it."""

    __slots__ = "_arrives_at", "_network", "_stuck", "closed", "ends", "on_close"

    def __init__(self, network: Network, one: Process, other: Process) -> None:
        self.ends = one, other
        self.closed = {one: False, other: False}
        self.on_close: dict[Process, Callable[[], object]] = {}
        self._network = network
        self._arrives_at = {one: 0.0, other: 0.0}
        self._stuck: dict[Process, list[tuple[Callable[..., object], tuple[Any, ...]]]] = {}  # by target

    def peer_of(self, end: Process) -> Process:
        one, other = self.ends
        return other if end is one else one

    def send(self, source: Process, action: Callable[..., object], *arguments: Any) -> None:
        """Have it happen at the other end, behind what was sent before."""
        if self.closed[source]:
            return
        one, target = self.ends
        if target is source:
            target = one
        network = self._network
        blocked = network.blocked and network.is_blocked(source.node, target.node)
        if blocked or (self._stuck and target in self._stuck):
            if target not in self._stuck:
                self._stuck[target] = []
                network._wait(source.node, target.node, lambda: self._unstick(source, target))
            self._stuck[target].append((action, arguments))
            return
        queue = target.queue
        at = queue.now + network.delay_s(source.node, target.node)
        if at < self._arrives_at[target]:
            at = self._arrives_at[target]
        self._arrives_at[target] = at
        queue.put(at, target, self._arrive, (target, action, arguments))

    def close(self, end: Process) -> None:
        """The other end learns of it behind what was sent. Idempotent."""
        if not self.closed[end]:
            self.send(end, self._closed_by_peer, self.peer_of(end))
            self.closed[end] = True
            if self.closed[self.peer_of(end)] or not self.peer_of(end).is_alive:
                self._network.forget(self)

    def break_off(self) -> None:
        """Both ends see it closed at once, and what was under way is lost."""
        for end in self.ends:
            if not self.closed[end]:
                end.queue.put(end.queue.now, end, self._closed_by_peer, (end,))
            self.closed[end] = True

    def _unstick(self, source: Process, target: Process) -> None:
        """Packets are sent again after a pause that grew while nothing was heard."""
        network = self._network
        if network.is_blocked(source.node, target.node):
            network._wait(source.node, target.node, lambda: self._unstick(source, target))
            return
        at = target.queue.now + RESEND_S * (1 + 4 * network._chance.random())
        at = self._arrives_at[target] = max(at, self._arrives_at[target])
        for action, arguments in self._stuck.pop(target):
            target.queue.put(at, target, self._arrive, (target, action, arguments))

    def _arrive(self, target: Process, action: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if not self.closed[target]:
            action(*arguments)

    def _closed_by_peer(self, end: Process) -> None:
        self.closed[end] = True
        self._network.forget(self)
        if end in self.on_close:
            self.on_close[end]()
