"""Another engine in a process of its own, which runs a workload when asked. Knows no particular engine.

A process of its own, so that neither side's threads spin on the other's cores.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from cluster.commands.bench.decode.figures import Run, Workload
from cluster.commands.bench.openmp import environment
from cluster.errors import MantaError, SetupError

CALIBRATION_TOKENS = 6
CALIBRATION_RUNS = 2
START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 10.0
HOPELESS = 1.5  # times the best: no second try

Way = TypeVar("Way")  # in which it can be run; as text, for people


class RivalProcess(ABC, Generic[Way]):
    """The process; a context manager that ends it."""

    name: str

    def __init__(self, serve: Callable[..., None], *args: Any, variables: Mapping[str, str] | None = None) -> None:
        """`serve(connection, *args)` runs in the new process: see `serve_tasks`."""
        self.variables = dict(variables or {})
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        with environment(self.variables):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        try:
            self.num_threads = int(self._answer(START_TIMEOUT_S))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    @abstractmethod
    def run(self, workload: Workload, way: Way) -> Run:
        """Greedy, with forced length. Raises SetupError where that way does not run."""

    @abstractmethod
    def ways(self, workload: Workload) -> list[Way]:
        """All that may be the fastest."""

    def fastest(self, workload: Workload) -> Way:
        """The best of all that run at all, by the workload's own measure, in short runs."""
        decodes = workload.output_tokens > 1
        short = replace(workload, output_tokens=min(workload.output_tokens, CALIBRATION_TOKENS))
        best: tuple[float, Way] | None = None
        for way in self.ways(workload):
            for _ in range(CALIBRATION_RUNS):
                try:
                    run = self.run(short, way)
                except SetupError:
                    break  # not on this machine or not with these sizes
                seconds = run.decode_s if decodes else run.prefill_s
                if best is None or seconds < best[0]:
                    best = (seconds, way)
                elif seconds > HOPELESS * best[0]:
                    break
        if best is None:
            raise SetupError(f"{self.name} ran in none of its ways")
        return best[1]

    def _ask(self, task: Any) -> Run:
        self._connection.send(task)
        run = self._answer(None)
        assert isinstance(run, Run)
        return run

    def _answer(self, timeout_s: float | None) -> Any:
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                raise SetupError(f"{self.name} did not load the model within {timeout_s:g} s")
            answer = self._connection.recv()
        except EOFError as error:
            raise SetupError(f"the process that runs {self.name} ended") from error
        if isinstance(answer, MantaError):
            raise answer
        return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def serve_tasks(connection: Connection, num_threads: int, run: Callable[[Any], Run]) -> None:
    """In the new process, once the model is loaded: run tasks until the other end closes."""
    connection.send(num_threads)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(run(task))
        except Exception as error:
            connection.send(SetupError(f"failed with {task}"[:200] + f": {error}"))
