"""`/metrics`: the figures of every process, gathered. Knows how to ask Serve's deployments; knows no figure itself.

A gateway replica behind a proxy would otherwise show whichever process the proxy picked. `broadcast` asks every live
replica of a deployment, by what the handle knows of who lives; handles of the actors would need Serve's private tables.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from cluster.expert_deployments import first_deployment
from cluster.messages import ModelCard
from cluster.telemetry.metrics import ProcessFigures, exposition, labelled
from gateway.telemetry.metrics import GatewayMetrics

MAX_AGE_S = 1.0
TIMEOUT_S = 2.0  # for all processes together: they are asked at once
GATEWAY = "gateway"  # its application and its deployment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A deployment whose replicas have figures."""

    application: str
    deployment: str
    model: str = ""  # empty: the gateway, whose figures name their models themselves


# What a source's processes answered, and how many of them did not within so many seconds.
_AnswerT = TypeVar("_AnswerT")
Ask = Callable[[Source, float], Awaitable[tuple[list[_AnswerT], int]]]


class MetricsPage:
    """Gathers at most once a second, whoever asks how often."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        cards: Sequence[ModelCard],
        ask: Ask[ProcessFigures] | None = None,
        replica: str = "",
    ) -> None:
        """Without `ask`, the page is this process's own, as where there is no Serve. `replica` is our own id."""
        self._metrics = metrics
        self._replica = replica
        self._ask = ask
        self._sources = [Source(GATEWAY, GATEWAY)] + [
            Source(card.application, deployment, card.name) for card in cards for deployment in card.deployments
        ]
        self._page = b""
        self._gathered_at = float("-inf")
        self._gathering: asyncio.Task[None] | None = None

    async def response(self) -> Response:
        """The page as an HTTP answer."""
        return Response(await self.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def page(self) -> bytes:
        """The text of all processes that answered, at most MAX_AGE_S old."""
        if time.monotonic() - self._gathered_at > MAX_AGE_S:
            if self._gathering is None or self._gathering.done():
                self._gathering = asyncio.create_task(self._gather())
            await asyncio.shield(self._gathering)
        return self._page

    async def _gather(self) -> None:
        answers = await asyncio.gather(*(self._figures(source) for source in self._sources)) if self._ask else []
        own = self._metrics.figures(self._replica)
        families = labelled(own.families, _labels(Source(GATEWAY, GATEWAY), self._replica))
        for source, figures in answers:
            for one in figures:
                if one.replica != self._replica:
                    families += labelled(one.families, _labels(source, one.replica))
        self._page = exposition(families)
        self._gathered_at = time.monotonic()

    async def _figures(self, source: Source) -> tuple[Source, list[ProcessFigures]]:
        assert self._ask is not None
        try:
            figures, silent = await self._ask(source, TIMEOUT_S)
        except Exception:
            logger.debug("no figures of %s", source, exc_info=True)
            figures, silent = [], 1
        if silent:
            self._metrics.scrape_failures.labels(source.model, source.deployment).inc(silent)
        return source, figures


class ServeProcesses:
    """Asks replicas through Serve's handles, which are made when first needed and kept."""

    def __init__(self, method: str) -> None:
        """`method` of the replicas is what they are asked by; it takes nothing."""
        self._method = method
        self._handles: dict[Source, Any] = {}

    async def __call__(self, source: Source, timeout_s: float) -> tuple[list[Any], int]:
        from ray.serve.exceptions import RayServeException

        async with asyncio.timeout(timeout_s):
            handle = self._handles.get(source)
            if handle is None:
                handle = self._handles[source] = await asyncio.to_thread(_handle, source)
            try:
                # `results_async` would fail as a whole when one replica is silent, so each is waited for by itself.
                replicas = await handle.broadcast(self._method)._fetch_replica_results_async()
            except RayServeException:
                if first_deployment(source.deployment) == source.deployment:
                    raise
                return [], 0  # a group's other tier, which may have no replica
        asked = [asyncio.ensure_future(replica.get_async()) for replica in replicas]
        answered, silent = await asyncio.wait(asked, timeout=timeout_s)
        for one in silent:
            one.cancel()
        answers = [one.result() for one in answered if not one.cancelled() and one.exception() is None]
        return answers, len(asked) - len(answers)


def _handle(source: Source) -> Any:
    """Asks Serve's controller whether there is such a deployment, so it blocks for milliseconds."""
    from ray import serve

    return serve.get_deployment_handle(source.deployment, app_name=source.application)


def _labels(source: Source, replica: str) -> dict[str, str]:
    labels = {"deployment": source.deployment, "replica": replica}
    return labels | {"model": source.model} if source.model else labels
