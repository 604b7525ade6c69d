"""Faults of the decision code, one line each, that the simulation has to notice."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.planning import scaling_policy
from cluster.simulation import coordinator
from experts_service.carriers.routes import LaneRoutes
from experts_service.delivery.delivery import Deliveries, Delivery
from experts_service.routing_table import RoutingTable
from gateway.coordinators import resumption
from gateway.coordinators.token_inbox import TokenInbox
from gateway.coordinators.token_streams import TokenStreams
from router_service.scheduling.block_manager import BlockManager
from router_service.token_outbox import OutgoingTokens


@dataclass(frozen=True)
class Mutation:
    """`old` in the source of a function becomes `new`."""

    name: str
    owner: Any
    function: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = inspect.getattr_static(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(before))
        assert source.count(self.old) == 1, f"{self.name}: the code is another now"
        module = inspect.getmodule(before)
        assert module is not None
        space: dict[str, Any] = {}
        exec(compile("from __future__ import annotations\n" + source.replace(self.old, self.new), self.name, "exec"),
             module.__dict__, space)  # fmt: skip
        setattr(self.owner, self.function, space[self.function])
        try:
            yield
        finally:
            setattr(self.owner, self.function, before)


MUTATIONS = [
    Mutation("a fence is dropped: old news of a new connection", RoutingTable, "suspect", "if not stale:", "if True:"),
    Mutation("a suspect is forgotten", Deliveries, "suspect", "self.table.suspect", "(lambda *_: None)"),
    Mutation("a hedge is not booked", Delivery, "_look_after", "shared.loads.hedged()", "pass"),
    Mutation("the deadline is late", Delivery, "step", "now >= self.deadline and", "now >= self.deadline + 1 and"),
    Mutation("the loser of a hedge stays posted", Delivery, "_take", "shared.carrier.cancel(other)", "pass"),
    Mutation("a silent replica is not given up", Delivery, "_look_after", "if now >= self._silent_at:", "if False:"),
    Mutation("a hedge's answer is not taken", Delivery, "step", "second.state is ANSWERED:", "False:"),
    Mutation(
        "an answer is taken twice",
        Delivery,
        "_take",
        "self.answer = answered",
        "self.answer = answered; answered.accept()",
    ),
    Mutation("no pause between attempts", Delivery, "_put_off", "now + self._pause_s", "now + 0.001"),
    Mutation("departed replicas keep their lanes", LaneRoutes, "_look_at_table", "links.keep_only(known)", "True"),
    Mutation("tokens are asked for again", resumption, "generate", "output += chunk.token_ids", "pass"),
    Mutation("a lost coordinator is not told of", TokenInbox, "lose", "queue.fail(", "str("),
    Mutation("silence is not noticed", TokenStreams, "_keep_watch", "+= 1", "+= 0"),
    Mutation("an end is not told", OutgoingTokens, "put", "self._end.set_result(None)", "pass"),
    Mutation(
        "a block is not given back",
        BlockManager,
        "free",
        "len(sequence.block_table) - 1",
        "len(sequence.block_table) - 2",
    ),
    Mutation(
        "a block is held by nobody",
        BlockManager,
        "_hold",
        "self._references[block] += 1",
        "self._references[block] += 2",
    ),
    Mutation("a load is rounded down", scaling_policy, "desired_replicas", "math.ceil(", "math.floor("),
    Mutation("no slack in scaling", scaling_policy, "desired_replicas", "SLACK * target_load", "target_load"),
    Mutation("suspects are not looked at", coordinator, "look_at_suspects", "if now >= look_at and", "if False and"),
]
