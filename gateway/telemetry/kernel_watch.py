"""Which kernels answer for each model, asked of its processes while it serves. Knows no request and no kernel.

They are asked before a model's first answer and every MAX_AGE_S from then on, so that what answers say of them is the
same whichever gateway and coordinator they come from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from cluster.expert_deployments import first_deployment
from cluster.messages import ModelCard
from cluster.telemetry.kernels import ModelKernels, ProcessKernels
from gateway.telemetry.metrics_page import Ask, Source

MAX_AGE_S = 10.0
TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class KernelWatch:
    """What is known of them; `ask` None: nothing, as where there is no Serve."""

    def __init__(self, ask: Ask[ProcessKernels] | None = None) -> None:
        self._ask = ask
        self._known: dict[str, ModelKernels] = {}  # by application
        self._looked_at: dict[str, float] = {}

    def of(self, card: ModelCard) -> ModelKernels | None:
        """None until the coordinators and every group of experts have told theirs."""
        return self._known.get(card.application)

    def system_fingerprint(self, card: ModelCard) -> str:
        """Of the checkpoint and of the kernels."""
        kernels = self.of(card)
        return f"fp_{card.fingerprint[:8]}" + ("" if kernels is None else f"_{kernels.digest}")

    async def look(self, cards: Sequence[ModelCard]) -> None:
        """At models that can answer, unless that was lately."""
        now = time.monotonic()
        due = [card for card in cards if self.of(card) is None or now - self._looked_at[card.application] > MAX_AGE_S]
        await asyncio.gather(*(self._look(card) for card in due))

    async def _look(self, card: ModelCard) -> None:
        if self._ask is None or not card.deployments:
            return
        answers = await asyncio.gather(*(self._told_by(card, deployment) for deployment in card.deployments))
        told = {name: kernels for name, kernels in zip(card.deployments, answers, strict=True) if kernels}
        if {first_deployment(name) for name in told} != {first_deployment(name) for name in card.deployments}:
            return
        before, kernels = self.of(card), ModelKernels(told)
        self._known[card.application], self._looked_at[card.application] = kernels, time.monotonic()
        if kernels.mixed and (before is None or before.digest != kernels.digest):
            _warn(card, kernels)

    async def _told_by(self, card: ModelCard, deployment: str) -> tuple[ProcessKernels, ...]:
        """What all of a deployment's replicas say; where one is silent, what was known before."""
        assert self._ask is not None
        before = self.of(card)
        known = () if before is None else before.deployments.get(deployment, ())
        try:
            told, silent = await self._ask(Source(card.application, deployment, card.name), TIMEOUT_S)
        except Exception:
            logger.debug("no kernels of %s of %s", deployment, card.application, exc_info=True)
            return known
        return known if silent and known else tuple(told)


def _warn(card: ModelCard, kernels: ModelKernels) -> None:
    """Of replicas of one group that do not compute the same."""
    for name in kernels.mixed:
        formats = kernels.formats(name)
        logger.warning(
            "%s: replicas of %s compute by different kernels, so a token may hang on which one computed it; "
            "`manta status --kernels` shows them, and %s",
            card.name,
            name,
            f"their numbers are {' and '.join(formats)}"
            if len(formats) > 1
            else "on CPUs they have the same bits with engine.kernels: fma",
        )
