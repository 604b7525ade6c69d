"""Lane servers for tests: in this process, on real sockets, with experts whose answers do not depend on their batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.planning.placement import ExpertGroup
from experts_service.carriers.dialer import LaneDialer
from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.link import Link
from experts_service.routing_table import Deployment, Replica, RoutingTable
from experts_service.shard.batch import Maths, Prepare
from experts_service.shard.server import LaneServer
from experts_service.wire.address import LaneAddress
from experts_service.wire.frame import LaneShape
from router_service.dispatcher import Dispatcher
from tests.waiting import wait_for

SECRET = b"s" * 32
FINGERPRINT = "f" * 64
NUM_LAYERS, NUM_EXPERTS, HIDDEN = 3, 4, 8
GROUPS = (ExpertGroup(0, (0, 3)), ExpertGroup(1, (2, 1)))
HERE, ELSEWHERE = "this node", "another node"
MEMORY = False  # whether coordinators ask shards on their node for memory to share; tests of both ways set it
DEVICE: torch.device | None = None  # of whose memory they ask for some as well, and shards have it
LONG_S = 60.0  # what is waited for comes long before, on a busy machine, too


Run = Callable[[int, Tensor, Sequence[int]], Tensor]  # layer, rows [R, D], counts [E] → answers [R, D]


def maths(experts: Sequence[int]) -> Run:
    """Scales and shifts by layer and expert, element by element: bitwise the same in whatever batch."""

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        pieces = rows.split(list(counts))
        return torch.cat([(piece * (expert + 2) + layer).tanh() for piece, expert in zip(pieces, experts, strict=True)])

    return run


def stopped_in_layer_2() -> tuple[Run, threading.Event, threading.Event]:
    """The maths of group 0, which waits in layer 2; set when it has come there, and what lets it go on."""
    entered, opened = threading.Event(), threading.Event()

    def run(layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        if layer == 2:
            entered.set()
            assert opened.wait(LONG_S)
        return maths(GROUPS[0].experts)(layer, rows, counts)

    return run, entered, opened


def in_place(run: Run) -> Maths:
    """The same, written where answers may be written, as a shard's experts do it."""

    def run_in_place(layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None) -> Tensor:
        answer = run(layer, rows, counts)
        return answer if answers is None else answers.copy_(answer)

    return run_in_place


class LocalMaths:
    """The transport `local` over the same maths."""

    def send(self, layer: int, rows: Tensor, parts: Sequence[object]) -> LocalMaths:
        for part in parts:
            indices = torch.from_numpy(part.row_indices)  # type: ignore[attr-defined]
            answer = maths(GROUPS[part.group].experts)(layer, rows[indices], part.counts)  # type: ignore[attr-defined]
            part.answer.copy_(answer)  # type: ignore[attr-defined]
        return self

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Shards:
    """Servers by replica id, as a routing table knows them."""

    node: str = HERE  # where coordinators believe that the servers are: their own node, or another
    dtype: torch.dtype = torch.float32
    servers: dict[str, LaneServer] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)  # by replica id, of groups that are on several
    table: RoutingTable = field(default_factory=RoutingTable)
    dialled: list[str] = field(default_factory=list)
    transports: list[LaneTransport] = field(default_factory=list)
    memory: bool = field(default_factory=lambda: MEMORY)

    def start(
        self,
        replica_id: str,
        group: int,
        run: Run | None = None,
        *,
        fingerprint: str = FINGERPRINT,
        prepare: Prepare | None = None,
    ) -> LaneServer:
        """Serve a group and publish its replica."""
        experts = GROUPS[group].experts
        shape = LaneShape(NUM_LAYERS, len(experts), HIDDEN, self.dtype)
        run = in_place(run or maths(experts))
        server = LaneServer(
            run, shape, secret=SECRET, fingerprint=fingerprint, host="127.0.0.1", prepare=prepare, device=DEVICE
        )
        server.start()
        self.servers[replica_id] = server
        self.publish()
        return server

    def publish(self) -> None:
        for group in (0, 1):
            names = [name for name in self.servers if name.startswith(f"{group}")]
            replicas = [
                Replica(name, f"shard-{name}", "test", group, FINGERPRINT, self.tiers.get(name, "")) for name in names
            ]
            self.table.publish(Deployment("model", f"expert-{group}"), replicas)

    def both(self) -> Dispatcher:
        """Shards of both groups, those that have not been started, and a coordinator of theirs."""
        for group in (0, 1):
            if f"{group}a" not in self.servers:
                self.start(f"{group}a", group)
        return Dispatcher(GROUPS, self.transport())

    def links(self) -> list[Link]:
        """The connections of the first coordinator."""
        return list(self.transports[0].routes._links._links.values())

    def address(self, replica: Replica, timeout_s: float) -> LaneAddress:
        self.dialled.append(replica.replica_id)
        server = self.servers[replica.replica_id]
        return LaneAddress(str(server.path), "127.0.0.1", server.port, self.node, "first")

    def transport(
        self,
        timeout_s: float = LONG_S,
        secret: bytes = SECRET,
        fingerprint: str = FINGERPRINT,
        of_tiers: Mapping[str, str] | None = None,
    ) -> LaneTransport:
        dialer = LaneDialer(
            self.address,
            secret=secret,
            fingerprint=fingerprint,
            node_id=HERE,
            of_tiers=of_tiers,
            memory=self.memory,
            device=DEVICE,
        )
        deployments = {group: Deployment("model", f"expert-{group}") for group in (0, 1)}
        transport = LaneTransport(deployments, self.table, dialer, timeout_s=timeout_s)
        self.transports.append(transport)
        return transport


def wait_until_reached(transport: LaneTransport, group: int, number: int) -> None:
    """Return once so many replicas of the group are connected: dispatches wait for the first one only."""
    wait_for(lambda: len(transport.routes.reachable(group)) == number, LONG_S, f"{number} connections")


@contextmanager
def shards(node: str = HERE, dtype: torch.dtype = torch.float32) -> Iterator[Shards]:
    """No servers yet; those that the test starts, and its transports, end with it."""
    running = Shards(node, dtype)
    try:
        yield running
    finally:
        for transport in running.transports:
            transport.close()
        for server in running.servers.values():
            server.close()


def ask(dispatcher: Dispatcher, rows: Tensor, experts: Tensor, layer: int = 1) -> Tensor:
    """Dispatch `rows` [T, D] to `experts` [T, K] and combine with equal weights."""
    weights = torch.full(experts.shape, 0.5, device=rows.device)
    return dispatcher.combine(dispatcher.dispatch(layer, rows, experts), weights)


def batch(num_rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [T, D] and two different experts for each [T, 2]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    return rows, torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(2).indices


def expected(rows: Tensor, experts: Tensor, layer: int = 1) -> Tensor:
    return ask(Dispatcher(GROUPS, LocalMaths()), rows, experts, layer)
