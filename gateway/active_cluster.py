"""Whether this Ray cluster is the one that a RayService answers from. Asks DNS; knows no request.

An upgrade runs two Ray clusters beside each other. KubeRay keeps a Service at the head of the active one, whose name is
in MANTA_ACTIVE_HEAD, and one at the head of each, whose name it gives the pods of that cluster in FQ_RAY_IP. Both are
headless: what the names resolve to is the head's own address.

    the new cluster starts ──▶ its applications run: KubeRay moves the Service ──▶ GRACE_S later the old one says no

Whoever is not sure says for GRACE_S what was known before, and then yes: that both clusters are asked does little
harm, that neither is does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable

import ray

from cluster.ray_variables import ACTIVE_HEAD

OWN_HEAD = "FQ_RAY_IP"  # set by KubeRay
# Each pod sees the change at another time: what DNS says may be half a minute old, or a minute where nodes keep answers
# of their own. Until all gateways of the new cluster have seen it, the old one answers as well.
GRACE_S = 60.0
MAX_AGE_S = 1.0  # anybody may ask
LOOK_TIMEOUT_S = 2.0  # then what was known before is said; the probe waits for 4 s

logger = logging.getLogger(__name__)

Resolve = Callable[[str], frozenset[str]]  # a name's addresses, none where there are none; blocks
Heads = Callable[[], frozenset[str]]  # the addresses of this cluster's head; blocks


def resolve(name: str) -> frozenset[str]:
    """By the pod's own resolver, anew each time."""
    try:
        return frozenset(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return frozenset()


def ray_heads() -> frozenset[str]:
    """As Ray's control plane has them."""
    nodes = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    return frozenset(node["NodeManagerAddress"] for node in nodes)


class ActiveCluster:
    """One per gateway process. Without the two names, as on one machine, this is the only cluster there is."""

    def __init__(
        self,
        active: str | None = None,
        own: str | None = None,
        resolve: Resolve = resolve,
        heads: Heads = ray_heads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = (active, own) if active and own else None
        self._resolve = resolve
        self._heads = heads
        self._clock = clock
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")
        self._sure_at = clock()
        self._is_active = True
        self._was_active = False
        self._replaced_at: float | None = None

    @classmethod
    def of_environment(cls) -> ActiveCluster:
        """As KubeRay and our manifests say."""
        active, own = os.environ.get(ACTIVE_HEAD), os.environ.get(OWN_HEAD)
        if active and own and "." in own:  # both are in one namespace
            # From the root: a node's own search domain may have an answer for every name, also before KubeRay has made
            # the Service.
            active, own = f"{active}.{own.partition('.')[2]}.", f"{own}."
        return cls(active, own)

    async def is_this(self) -> bool:
        """Whether new requests belong here, as it was MAX_AGE_S ago or later."""
        if self._names is None:
            return True
        if self._looking is None and self._clock() - self._looked_at >= MAX_AGE_S:
            self._looking = asyncio.create_task(self._look(*self._names))
        if self._looking is not None:
            await asyncio.wait({self._looking}, timeout=LOOK_TIMEOUT_S)
        return self._is_active

    async def _look(self, active: str, own: str) -> None:
        try:
            is_replaced = await asyncio.to_thread(self._is_replaced, active, own)
        except Exception:  # whatever Ray raises while its control plane is away
            is_replaced = None
        finally:
            self._looking = None
            self._looked_at = self._clock()
        if is_replaced is not None:
            self._sure_at = self._looked_at
        elif self._looked_at - self._sure_at < GRACE_S:
            return
        if not is_replaced:
            self._was_active, self._replaced_at = True, None
        elif self._replaced_at is None:
            self._replaced_at = self._looked_at
        waits = self._was_active and self._replaced_at is not None and self._looked_at - self._replaced_at < GRACE_S
        is_active = not is_replaced or waits
        if is_active and not self._is_active:
            logger.info("this Ray cluster is the active one now")
        elif self._is_active and not is_active:
            logger.info("another Ray cluster is the active one: this gateway is not ready, and ends what it has")
        self._is_active = is_active

    def _is_replaced(self, active: str, own: str) -> bool | None:
        """Whether the active head is another cluster's; None where that is not sure."""
        named, ours = self._resolve(active), self._resolve(own)
        if not named:
            return None
        # A head that was restarted has another address, and each of the three may tell it later than the others.
        if named & ours or named & (heads := self._heads()):
            return False
        # Where the operator makes Services with an address of their own (ENABLE_RAY_HEAD_CLUSTER_IP_SERVICE), each name
        # has another, whatever is behind it, and it is no head's.
        return True if ours & heads else None
