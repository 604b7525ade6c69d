"""The Serve deployment of one expert group: starts its shard, watches it, says where it is. No rows pass through here.

Serve replaces a replica of this; Ray restarts the shard below it. `check_health` fails only when the shard cannot come
back by itself: a shard that is being restarted is given its load deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ScalingConfig
from cluster.errors import ExpertUnavailable, MantaError
from cluster.planning.scaling_policy import LOAD, REPORT_INTERVAL_S, WAITING, replica_options
from cluster.telemetry.kernels import ProcessKernels
from cluster.telemetry.metrics import ProcessFigures
from cluster.telemetry.process_logs import log_where_serve_does
from experts_service.membership import replica_metadata
from experts_service.shard.metrics import shard_families
from experts_service.shard.shard import ShardSpec, ShardStats, start_shard

REPLICA_CPUS = 0.01  # these wait; real cores go to the shard's threads, which Ray does not count
SHARD_CPUS = 0.01
PROBE_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 3.0  # for who asks through us; `manta status` waits for four seconds
DRAIN_S = 5.0  # for rows in flight when a replica stops
LEAVING_S = 10.0  # for coordinators to leave it before that
STUCK_S = 300.0  # a shard that is up and answers nothing for this long is restarted
NAMESPACE = "manta"


class ExpertService:
    """Supervises the shard of one replica."""

    async def __init__(self, spec: ShardSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        log_where_serve_does()
        context = serve.get_replica_context()
        self._spec = spec
        self._replica_id = context.replica_id.unique_id
        self._actor = f"{spec.application}:{spec.name}:{self._replica_id}"
        self._shard = start_shard(spec, self._actor, namespace=NAMESPACE, num_cpus=SHARD_CPUS, **_bundle(1))
        self._incarnation = ""
        self._restarts = -1  # the first start is none
        self._seen_at = time.monotonic()
        self._seen: ShardStats | None = None
        self._busy_fraction = 0.0  # of the last second or so
        self._queue_s = 0.0  # mean wait of the dispatches in it
        self._silent_since: float | None = None
        self._is_restarting = False  # its process is gone, and the next one has not answered yet
        self._dead: MantaError | None = None
        self._changed = asyncio.Condition()
        try:
            await self._probe(spec.load_timeout_s)
        except BaseException:
            ray.kill(self._shard)
            raise
        self._watch = asyncio.get_running_loop().create_task(self._keep_watch())

    def record_replica_metadata(self) -> dict[str, Any]:
        """Serve reads this once, when the replica is ready."""
        return replica_metadata(
            actor=self._actor, namespace=NAMESPACE, group=self._spec.group, fingerprint=self._spec.fingerprint
        )

    async def attach(self, coordinator: str) -> AsyncIterator[dict[str, str]]:
        """Yield this replica's id and its shard's incarnation, now and after each restart, until the caller leaves.

        A coordinator keeps one such stream open: it makes Serve build the router in the coordinator's process, and
        lets Serve wait for coordinators when the replica drains.
        """
        told = ""
        while True:
            if told != self._incarnation:
                told = self._incarnation
                yield {"replica_id": self._replica_id, "incarnation": told, "coordinator": coordinator}
            async with self._changed:
                await self._changed.wait_for(lambda: self._incarnation != told)  # noqa: B023

    async def stats(self) -> ShardStats:
        """Raises ExpertUnavailable while the shard is being restarted, with `is_restarting`, or does not answer."""
        try:
            stats: ShardStats = await asyncio.wait_for(self._shard.stats.remote(), ANSWER_TIMEOUT_S)
        except (RayActorError, TimeoutError) as error:
            self._is_restarting = self._is_restarting or isinstance(error, RayActorError)
            does = "is being restarted" if self._is_restarting else "does not answer"
            raise ExpertUnavailable(
                f"the shard of expert group {self._spec.group} {does}", is_restarting=self._is_restarting
            ) from error
        return stats

    async def kernels(self) -> ProcessKernels:
        """What computes in the shard; a gateway and `manta status` ask. Raises ExpertUnavailable as `stats` does."""
        return (await self.stats()).kernels

    async def metrics(self) -> ProcessFigures:
        """The shard's figures, for the gateway's /metrics. Raises ExpertUnavailable while it is being restarted."""
        families = shard_families(await self.stats(), self._spec.experts, self._busy_fraction, self._restarts)
        return ProcessFigures(self._replica_id, tuple(families))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy decides by; Serve's own count of requests knows nothing of rows."""
        return {LOAD: self._busy_fraction, WAITING: self._queue_s}

    def check_health(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._watch.done():
            raise ExpertUnavailable(f"nobody watches the shard of expert group {self._spec.group} any more")
        silent_s = 0.0 if self._silent_since is None else time.monotonic() - self._silent_since
        if silent_s > max(self._spec.load_timeout_s, STUCK_S):
            raise ExpertUnavailable(f"the shard of expert group {self._spec.group} is silent for {silent_s:.0f} s")

    async def __del__(self) -> None:
        """Serve calls this once coordinators have left: what is in flight is answered, then the shard goes."""
        if watch := self.__dict__.pop("_watch", None):
            watch.cancel()
            with suppress(RayError, TimeoutError):
                await asyncio.wait_for(self._shard.drain.remote(DRAIN_S), DRAIN_S + 1.0)
            ray.kill(self._shard)

    async def _keep_watch(self) -> None:
        restarted_at = float("-inf")
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            try:
                await self._probe(PROBE_TIMEOUT_S)
            except ActorDiedError as error:  # not "being restarted": it will not come back
                if self._dead is not None:
                    return
                self._dead = ExpertUnavailable(f"the shard of expert group {self._spec.group} died: {error}")
            except (ActorUnavailableError, ExpertUnavailable) as error:
                now = time.monotonic()
                self._dead = None
                self._is_restarting = self._is_restarting or isinstance(error, ActorUnavailableError)
                self._silent_since = self._silent_since or now
                stuck = isinstance(error, ExpertUnavailable) and now - max(self._silent_since, restarted_at) > STUCK_S
                if stuck:
                    restarted_at = now
                    ray.kill(self._shard, no_restart=False)
            else:
                self._silent_since = self._dead = None
                self._is_restarting = False

    async def _probe(self, timeout_s: float) -> None:
        """Ask for a sign of life and note the incarnation. Raises what went wrong."""
        try:
            stats: ShardStats = await asyncio.wait_for(self._shard.stats.remote(), timeout_s)
        except TimeoutError as error:
            raise ExpertUnavailable(
                f"the shard of expert group {self._spec.group} did not answer within {timeout_s:g} s"
            ) from error
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MantaError) else error) from None
        self._note_load(stats)
        if stats.incarnation != self._incarnation:
            self._restarts += 1
            async with self._changed:
                self._incarnation = stats.incarnation
                self._changed.notify_all()

    def _note_load(self, stats: ShardStats) -> None:
        """How busy the shard was since the last look, a second ago as a rule."""
        now = time.monotonic()
        seen_at, seen = self._seen_at, self._seen
        self._seen_at, self._seen = now, stats
        if seen is None or stats.incarnation != seen.incarnation or now <= seen_at:
            return
        self._busy_fraction = min(1.0, max(0.0, stats.busy_s - seen.busy_s) / (now - seen_at))
        frames = stats.lane_frames - seen.lane_frames
        self._queue_s = (stats.lane_queue_s - seen.lane_queue_s) / frames if frames else 0.0


def _bundle(index: int) -> dict[str, Any]:
    """Ray options that put an actor into a bundle of this replica's placement group."""
    group = get_current_placement_group()
    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}


def expert_deployment(
    spec: ShardSpec,
    scaling: ScalingConfig | None = None,
    *,
    code_version: str | None = None,
    tiers: Sequence[str] = (),
    max_surge_percent: int = 100,
    label_selector: Mapping[str, str] | None = None,
    request_timeout_s: float = 0.0,
) -> serve.Application:
    """The bound Serve deployment `expert-<group>`; its replicas are ready when their shards have loaded.

    A replica that is the last of its group, because its application is deleted, ends after the longest request. Without
    a surge the last one makes room for its successor, for which steps wait. `tiers`: as in `replica_options`. Serve
    restarts no replica whose `code_version` stays the same.
    """
    drain_s = LEAVING_S + (request_timeout_s if max_surge_percent else 0.0)
    scaling = scaling or ScalingConfig()
    shard_bundle = {"CPU": SHARD_CPUS} | ({"GPU": spec.gpus} if spec.gpus else {})
    deployment = serve.deployment(ExpertService).options(
        name=spec.name,
        **replica_options(scaling, tiers),
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=[{"CPU": REPLICA_CPUS}, shard_bundle],
        placement_group_strategy="STRICT_PACK",
        placement_group_bundle_label_selector=[dict(label_selector)] if label_selector else None,
        max_ongoing_requests=1000,  # one attach stream per coordinator, and status calls
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=drain_s,
        max_surge_percent=max_surge_percent,
        request_router_config=RequestRouterConfig(request_router_class="experts_service.membership.ExpertRouter"),
        logging_config=LoggingConfig(enable_access_log=False),
    )
    if code_version is not None:
        deployment = deployment.options(version=code_version, _internal=True)
    return deployment.bind(spec)
