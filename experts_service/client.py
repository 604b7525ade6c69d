"""The coordinator's side of the experts: knows who serves each group, and makes the transport that the config asks for.

pool = ExpertPool(handles)                # those of the groups' deployments, one for each tier of a group
pool.connect(timeout_s=…)                 # blocks until each group has a replica
transport = pool.transport(fingerprint, timeout_s)
…
pool.close()
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import ConfigError, MantaError
from cluster.expert_deployments import first_deployment, group_of
from cluster.telemetry.metrics import DispatchCounts
from experts_service.carriers.auto import AutoTransport
from experts_service.carriers.core_balance import CoreBalance
from experts_service.carriers.dialer import LaneDialer, ask_shard
from experts_service.carriers.lane import LaneTransport
from experts_service.carriers.object_store import ObjectStoreTransport
from experts_service.routing_table import TABLE, Deployment, Replica
from experts_service.shard_handles import NoHandle, ShardHandles
from experts_service.suspects import look_at_suspects
from experts_service.transport import Transport
from experts_service.wire.secret import read_lane_secret

logger = logging.getLogger(__name__)

REATTACH_PAUSE_S = 0.2
SIGN_OF_LIFE_S = 2.0
CLOSE_S = 2.0  # for the streams to end, and for the thread


class ExpertPool:
    """Keeps one `attach` stream open to each deployment, on a thread and event loop of its own."""

    def __init__(self, handles: Sequence[Any], coordinator: str = "") -> None:
        self._handles = {handle.deployment_name: handle for handle in handles}
        self._coordinator = coordinator
        self._table = TABLE
        self._deployments: dict[int, Deployment] = {}  # group → what identifies it in the table
        for name, handle in self._handles.items():
            group = group_of(name)
            assert group is not None, f"{name} is no deployment of experts"
            self._deployments[group] = Deployment(handle.app_name, first_deployment(name))
        self._shards = ShardHandles(self._table, self._deployments.values())
        self.latency = {group: DispatchCounts() for group in self._deployments}  # of dispatches, by group
        self._attached: dict[str, str] = {}  # deployment → replica id at the other end of its stream
        self._streams: dict[str, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stop_listening: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def connect(self, timeout_s: float) -> None:
        """Return once each group has a replica. Raises ExpertUnavailable, naming those without, at the timeout."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="expert-pool", daemon=True)
        self._thread.start()
        self._stop_listening = self._table.listen(self._on_change)
        self._tasks = asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()
        self._table.wait_for(self._deployments.values(), timeout_s)

    def transport(
        self,
        fingerprint: str,
        timeout_s: float,
        *,
        name: str = "object_store",
        of_tiers: Mapping[str, str] | None = None,
        lane_secret_file: str | None = None,
        spread_over_cores: bool = False,
        device: torch.device | None = None,
    ) -> Transport:
        """The transport `auto`, `lane` or `object_store` to these groups. Raises ConfigError for a lane without secret.

        `auto` is the object store on a node where the secret cannot be read, and shares memory with the shards of this
        one; `lane` sends everything. `of_tiers`: the fingerprints of deployments that round the checkpoint otherwise
        than the others. `device`: ours, where `auto` is to share memory of their GPUs as well.
        """
        object_store = ObjectStoreTransport(
            self._deployments,
            self._table,
            self._shards,
            fingerprint=fingerprint,
            of_tiers=of_tiers,
            timeout_s=timeout_s,
            latency=self.latency,
        )
        if name == "object_store":
            return object_store
        try:
            if lane_secret_file is None:
                raise ConfigError("lane_secret_file: none was given")
            secret = read_lane_secret(Path(lane_secret_file))
        except ConfigError as error:
            if name == "lane":
                raise
            logger.warning("rows go through the object store, not over lanes: %s", error)
            return object_store
        node_id = ray.get_runtime_context().get_node_id()
        dialer = LaneDialer(
            partial(ask_shard, self._shards),
            secret=secret,
            fingerprint=fingerprint,
            of_tiers=of_tiers,
            node_id=node_id,
            memory=name == "auto",
            device=device,
        )
        lane = LaneTransport(
            self._deployments,
            self._table,
            dialer,
            timeout_s=timeout_s,
            latency=self.latency,
            cores=CoreBalance(sorted(os.sched_getaffinity(0))) if spread_over_cores else None,
        )
        return lane if name == "lane" else AutoTransport(lane, object_store)

    def missing(self) -> list[str]:
        """Deployments without a replica that is believed to answer: not ready while there is one."""
        return [d.name for d in self._deployments.values() if all(r.suspected for r in self._table.replicas(d))]

    def close(self) -> None:
        """End the streams and the thread. Idempotent."""
        self._shards.close()
        if self._thread is None:
            return
        if self._stop_listening is not None:
            self._stop_listening()
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()
        self._thread = None

    async def _begin(self) -> list[asyncio.Task[None]]:
        looks = look_at_suspects(self._table, self._deployments.values(), self._lives)
        tasks = [asyncio.create_task(one) for one in (*starmap(self._stay_attached, self._handles.items()), looks)]
        for task in tasks:
            task.add_done_callback(_report)
        return tasks

    async def _end(self) -> None:
        """A task that is still pending when its loop has gone is told of on standard error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _stay_attached(self, name: str, handle: Any) -> None:
        deployment = Deployment(handle.app_name, first_deployment(name))
        streaming = handle.options(stream=True)  # has Serve build the router here, which fills the table
        while True:
            # Serve adds a replica for a call that waits for one, so a tier that may have none is not asked before.
            while deployment.name != name and all(one.tier != name for one in self._table.replicas(deployment)):
                await asyncio.sleep(REATTACH_PAUSE_S)
            try:
                stream = streaming.attach.remote(self._coordinator)
                self._streams[name] = stream
                async for where in stream:
                    self._attached[name] = where["replica_id"]
                    self._table.trust(deployment, where["replica_id"])
            except (RayError, RayServeException) as error:
                logger.info("attach stream of %s ended: %s", name, type(error).__name__)
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # by close, not by its stream
                    raise
            finally:
                if ended := self._streams.pop(name, None):
                    ended.cancel()
                self._attached.pop(name, None)
            await asyncio.sleep(REATTACH_PAUSE_S)

    def _on_change(self) -> None:
        self._loop.call_soon_threadsafe(self._leave_the_departed)

    def _leave_the_departed(self) -> None:
        """End streams to replicas that Serve no longer lists: it waits for us before it stops them."""
        known = {r.replica_id for one in self._deployments.values() for r in self._table.replicas(one)}
        for name, replica_id in list(self._attached.items()):
            if replica_id not in known:
                self._streams[name].cancel()

    async def _lives(self, replica: Replica) -> bool:
        """Whether the shard answers a call. One that is not found yet is looked up until the next time."""
        try:
            await asyncio.wait_for(self._shards.get(replica, 0.0).stats.remote(), SIGN_OF_LIFE_S)
        except ActorDiedError:
            self._shards.forget(replica)
            return False
        except (RayError, NoHandle, TimeoutError, MantaError):
            return False
        return True


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("an attach stream is not kept any more: %r", error)
