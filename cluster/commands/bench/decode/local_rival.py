"""The same engine with its experts in this process, as a rival: its speed-up is what separation costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.commands.bench.decode.engine import EngineUnderTest
from cluster.commands.bench.decode.figures import Run, Workload

WAY = "experts in this process"


class LocalRival:
    """Runs as a `RivalProcess` does, with one way. Whoever made the engine ends it."""

    name = "local"
    variables: Mapping[str, str] = {}

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine = engine
        self.num_threads = torch.get_num_threads()

    def fastest(self, workload: Workload) -> str:
        """The only way. Runs the workload once, so that what it needs is compiled and in memory."""
        self._engine.run(workload)
        return WAY

    def run(self, workload: Workload, way: str) -> Run:
        """As `EngineUnderTest.run`."""
        assert way == WAY
        return self._engine.run(workload)
