"""`/metrics`: the figures of every process, gathered. Knows how to ask Serve's deployments; knows no figure itself.

A gateway replica behind a proxy would otherwise show whichever process the proxy picked. `broadcast` asks every live
replica of a deployment and comes with what a handle has already, its own view of who lives; actor handles would need
Serve's private tables. Its blocking form is used, in a thread: it alone gives what the others said when one is silent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from cluster.messages import ModelCard
from cluster.metrics import ProcessFigures, exposition, labelled
from gateway.metrics import GatewayMetrics

MAX_AGE_S = 1.0
MAX_THREADS = 64
TIMEOUT_S = 2.0  # for all processes together: they are asked at once
GATEWAY = "gateway"  # its application and its deployment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A deployment whose replicas have figures."""

    application: str
    deployment: str
    model: str = ""  # empty: the gateway, whose figures name their models themselves


# A source's figures, and how many of its processes did not answer; blocks until the time limit at most.
Ask = Callable[[Source, float], tuple[list[ProcessFigures], int]]


class MetricsPage:
    """Gathers at most once a second, whoever asks how often."""

    def __init__(
        self, metrics: GatewayMetrics, cards: Sequence[ModelCard], ask: Ask | None = None, replica: str = ""
    ) -> None:
        """Without `ask`, the page is this process's own, as where there is no Serve. `replica` is our own id."""
        self._metrics = metrics
        self._replica = replica
        self._ask = ask
        self._sources = [Source(GATEWAY, GATEWAY)] + [
            Source(card.application, deployment, card.name) for card in cards for deployment in card.deployments
        ]
        # Of our own: threads that wait for a silent process are not to keep prompts from being tokenized.
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, len(self._sources)), thread_name_prefix="metrics")
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
            async with asyncio.timeout(2 * TIMEOUT_S):  # a thread that hangs in spite of its own limit
                loop = asyncio.get_running_loop()
                figures, silent = await loop.run_in_executor(self._threads, self._ask, source, TIMEOUT_S)
        except Exception:
            logger.debug("no figures of %s", source, exc_info=True)
            figures, silent = [], 1
        if silent:
            self._metrics.scrape_failures.labels(source.model, source.deployment).inc(silent)
        return source, figures


class ServeProcesses:
    """Asks replicas through Serve's handles, which are made when first needed and kept."""

    def __init__(self) -> None:
        self._handles: dict[Source, Any] = {}

    def __call__(self, source: Source, timeout_s: float) -> tuple[list[ProcessFigures], int]:
        from ray import serve

        handle = self._handles.get(source)
        if handle is None:
            handle = self._handles[source] = serve.get_deployment_handle(source.deployment, app_name=source.application)
        answers = handle.broadcast("metrics").results(timeout_s=timeout_s, return_exceptions=True)
        figures = [answer for answer in answers if isinstance(answer, ProcessFigures)]
        return figures, len(answers) - len(figures)


def _labels(source: Source, replica: str) -> dict[str, str]:
    labels = {"deployment": source.deployment, "replica": replica}
    return labels | {"model": source.model} if source.model else labels
