"""Whether a model can answer, and how far it is with loading. Asks Serve, at most twice a second; knows no request.

A model is ready when each of its deployments has a running replica (of a group of experts: on one of its tiers), which
is also true during a rolling update, and when its coordinator believes that each group of experts answers: what Serve
knows of are the processes that watch the shards, and a shard that is being restarted is missed by coordinators only. Of
several versions of a model, the first that is ready answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from cluster.errors import MantaError, ModelLoading
from cluster.expert_deployments import first_deployment
from cluster.messages import ModelCard

MAX_AGE_S = 0.5
MAX_AGE_BEHIND_REQUESTS_S = 2.0  # while everything is ready; a probe costs milliseconds of the controller's time
PROBE_TIMEOUT_S = 5.0
RETRY_AFTER_S = 2.0

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
        if self.phase == "loading" and self.total_bytes:
            return f"loading weights, {self.loaded_bytes / 1e6:.0f} of {self.total_bytes / 1e6:.0f} MB"
        if self.phase == "recovering":
            return f"waiting for {', '.join(self.waiting_for)}"
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
        self._refreshing: asyncio.Task[None] | None = None

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
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found = await asyncio.to_thread(self._probe, self._cards)
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
            self._states = found | recovering
        except Exception:
            logger.warning("Serve's status could not be had", exc_info=True)
        self._began_at, self._probed_at = began_at, time.monotonic()

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
        application = applications.get(card.application)
        if application is None:
            found[card.application] = ModelHealth("starting", card.deployments)
            continue
        running = {
            name: any(replica["state"] == "RUNNING" for replica in deployment["replicas"])
            for name, deployment in application["deployments"].items()
        }
        wanted = card.deployments or tuple(running)
        living = {first_deployment(name) for name, up in running.items() if up}
        missing = tuple(name for name in dict.fromkeys(map(first_deployment, wanted)) if name not in living)
        if wanted and not missing:
            found[card.application] = ModelHealth("ready")
            continue
        if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            found[card.application] = ModelHealth("failed", missing)
            continue
        progress = read_progress(card.application)
        loaded, total = sum(p.loaded_bytes for p in progress), sum(p.total_bytes for p in progress)
        found[card.application] = ModelHealth("loading" if progress else "starting", missing, loaded, total)
    return found
