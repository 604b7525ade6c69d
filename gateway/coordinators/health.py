"""Whether a model can answer, and how far it is with loading. Asks Serve, at most twice a second; knows no request.

A model is ready when each of its deployments has a running replica (of a group of experts: on one of its tiers), which
is also true during a rolling update, and when its coordinator believes that each group of experts answers: what Serve
knows of are the processes that watch the shards, and a shard that is being restarted is missed by coordinators only. Of
several versions of a model, the first that is ready answers.

What died is replaced by Serve, and is recovering meanwhile. It has failed when Serve says that replicas do not start,
three in a row, or when that lasts (RECOVERY_S).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.errors import MantaError, ModelLoading
from cluster.expert_deployments import first_deployment
from cluster.messages import ModelCard
from cluster.telemetry.progress import Progress

MAX_AGE_S = 0.5
MAX_AGE_BEHIND_REQUESTS_S = 2.0  # while everything is ready; a probe costs milliseconds of the controller's time
PROBE_TIMEOUT_S = 5.0
HUNG_PROBE_TIMEOUT_S = 0.5  # for one that has not come back in that time: a load balancer's own timeout may be short
RETRY_AFTER_S = 2.0
# From then on what was recovering is called failed. Where a node was lost, another may take ten minutes to come, and
# then weights are read.
RECOVERY_S = 15 * 60.0

logger = logging.getLogger(__name__)

Phase = Literal["starting", "loading", "ready", "recovering", "failed"]


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """One model's state."""

    phase: Phase
    waiting_for: tuple[str, ...] = ()  # deployments without a running replica; recovering: without one that answers
    loaded_bytes: int = 0
    total_bytes: int = 0

    def __str__(self) -> str:
        loading = f"loading weights, {self.loaded_bytes / 1e6:.0f} of {self.total_bytes / 1e6:.0f} MB"
        if self.phase == "loading" and self.total_bytes:
            return loading
        if self.phase == "recovering":
            return f"waiting for {', '.join(self.waiting_for)}" + (f", {loading}" if self.total_bytes else "")
        if self.phase == "failed" and self.waiting_for:
            return f"failed, there is no {' and no '.join(self.waiting_for)}"
        return self.phase


Probe = Callable[[Sequence[ModelCard]], dict[str, ModelHealth]]  # by application; may block
Missing = Callable[[ModelCard], Awaitable[tuple[str, ...]]]  # the groups that a coordinator misses; raises MantaError
Look = Callable[[Sequence[ModelCard]], Awaitable[None]]  # at models that can answer, before they are said to


class Health:
    """Caches a probe. `require` costs nothing while a model is ready: it then refreshes behind the request."""

    def __init__(
        self, cards: Sequence[ModelCard], probe: Probe, missing: Missing | None = None, look: Look | None = None
    ) -> None:
        self._cards = tuple(cards)
        self._probe = probe
        self._missing = missing
        self._look = look
        self._states = {card.application: ModelHealth("starting", card.deployments) for card in cards}
        self._began_at = self._probed_at = float("-inf")  # the last probe that has ended
        self._recovering_since: dict[str, float] = {}  # by application
        self._refreshing: asyncio.Task[None] | None = None
        self._probing: tuple[float, asyncio.Future[dict[str, ModelHealth]]] | None = None  # when it began

    async def models(self) -> dict[str, ModelHealth]:
        """The state of the version that answers, by the model's name, at most MAX_AGE_S old."""
        await self._look_again()
        versions: dict[str, list[ModelCard]] = {}
        for card in self._cards:
            versions.setdefault(card.name, []).append(card)
        return {name: self._states[self.first_ready(cards).application] for name, cards in versions.items()}

    def first_ready(self, versions: Sequence[ModelCard]) -> ModelCard:
        """The version that answers, by what is known; the first where none does."""
        return next((card for card in versions if self._states[card.application].phase == "ready"), versions[0])

    async def require(self, versions: Sequence[ModelCard]) -> ModelCard:
        """The version that answers. Raises ModelLoading when none is ready.

        Only a probe that began after the call can refuse it: another gateway may have said that the model is ready.
        """
        called_at = time.monotonic()
        while True:
            card = self.first_ready(versions)
            state = self._states[card.application]
            if state.phase == "ready":
                if called_at - self._probed_at > MAX_AGE_BEHIND_REQUESTS_S:
                    self._refresh()
                return card
            if self._began_at >= called_at:
                raise ModelLoading(f"the model {card.name!r} is not ready: {state}", retry_after_s=RETRY_AFTER_S)
            await asyncio.sleep(max(0.0, self._probed_at + MAX_AGE_S - time.monotonic()))
            await asyncio.shield(self._refresh())

    async def _look_again(self) -> None:
        if time.monotonic() - self._probed_at > MAX_AGE_S:
            await asyncio.shield(self._refresh())

    def _refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._ask())
        return self._refreshing

    async def _ask(self) -> None:
        """What cannot be asked stays as it was known: coordinators that live answer without Serve's controller."""
        began_at = time.monotonic()
        hangs = self._probing is not None
        try:
            async with asyncio.timeout(HUNG_PROBE_TIMEOUT_S if hangs else PROBE_TIMEOUT_S):
                began_at, found = await self._probed(began_at)
                ready = [card for card in self._cards if found[card.application].phase == "ready"]
                if self._look is not None:
                    await self._look(ready)
                asked = [card for card in ready if card.has_remote_experts]
                answers = await asyncio.gather(*(self._missed(card) for card in asked))
            recovering = {
                card.application: ModelHealth("recovering", missing)
                for card, missing in zip(asked, answers, strict=True)
                if missing
            }
            self._states = self._bounded(found | recovering, began_at)
        except Exception as error:
            if not hangs:  # which was said
                logger.warning("Serve's status could not be had", exc_info=not isinstance(error, TimeoutError))
        self._began_at, self._probed_at = began_at, time.monotonic()

    async def _probed(self, now_s: float) -> tuple[float, dict[str, ModelHealth]]:
        """The answer, and when the probe began. One that hangs is waited for again: each takes a thread for as long."""
        if self._probing is None:
            self._probing = now_s, asyncio.get_running_loop().run_in_executor(None, self._probe, self._cards)
        began_at, probing = self._probing
        try:
            return began_at, await asyncio.shield(probing)
        finally:
            if probing.done():
                self._probing = None

    def _bounded(self, states: Mapping[str, ModelHealth], now_s: float) -> dict[str, ModelHealth]:
        """With those called failed that have been recovering for too long, as far as this gateway has seen."""
        recovering = [name for name, state in states.items() if state.phase == "recovering"]
        self._recovering_since = {name: self._recovering_since.get(name, now_s) for name in recovering}
        late = [name for name, since in self._recovering_since.items() if now_s - since > RECOVERY_S]
        return {**states, **{name: replace(states[name], phase="failed") for name in late}}

    async def _missed(self, card: ModelCard) -> tuple[str, ...]:
        """None when no coordinator says so: it may be lost just now, and another one take its requests."""
        if self._missing is None:
            return ()
        with suppress(MantaError):
            return await self._missing(card)
        return ()


def probe_serve(cards: Sequence[ModelCard]) -> dict[str, ModelHealth]:
    """Asks Serve's controller; blocks for milliseconds.

    An application that runs has all its replicas. Only of others the replicas are asked for, as the controller tells
    them: `serve.status()` pickles every deployment's request router on the way, for half a tenth of a second.
    """
    from ray.serve.context import _get_global_client

    from cluster.telemetry.progress import read_progress

    client = _get_global_client()
    statuses = {status.name: status.app_status.status for status in client.list_serve_statuses()}
    found = {card.application: ModelHealth("ready") for card in cards if statuses.get(card.application) == "RUNNING"}
    others = [card for card in cards if card.application not in found]
    applications = client.get_serve_details()["applications"] if others else {}
    for card in others:
        found[card.application] = health_of(card, applications.get(card.application), read_progress(card.application))
    return found


def health_of(card: ModelCard, application: Mapping[str, Any] | None, progress: Sequence[Progress]) -> ModelHealth:
    """Of an application as Serve's details tell it, which has not all of its replicas."""
    if application is None:
        return ModelHealth("starting", card.deployments)
    deployments = application["deployments"]
    running = {
        name: any(replica["state"] == "RUNNING" for replica in deployment["replicas"])
        for name, deployment in deployments.items()
    }
    wanted = card.deployments or tuple(running)
    living = {first_deployment(name) for name, up in running.items() if up}
    missing = tuple(name for name in dict.fromkeys(map(first_deployment, wanted)) if name not in living)
    if wanted and not missing:
        return ModelHealth("ready")
    # Serve's words: a deployment is UNHEALTHY from the death of a replica until all run again, and DEPLOY_FAILED if it
    # was being changed meanwhile. Only the trigger tells a death from starts that failed, three in a row or more.
    broken = [
        one
        for name, one in deployments.items()
        if not running[name] and one["status"] in ("UNHEALTHY", "DEPLOY_FAILED")
    ]
    built = any(one["status"] == "DEPLOY_FAILED" for one in deployments.values())
    if (application["status"] == "DEPLOY_FAILED" and not built) or any(
        one["status_trigger"] != "HEALTH_CHECK_FAILED" for one in broken
    ):
        return ModelHealth("failed", missing)
    if broken:
        progress = [p for p in progress if first_deployment(p.deployment) in missing and p.loaded_bytes < p.total_bytes]
    loaded, total = sum(p.loaded_bytes for p in progress), sum(p.total_bytes for p in progress)
    return ModelHealth("recovering" if broken else "loading" if progress else "starting", missing, loaded, total)
