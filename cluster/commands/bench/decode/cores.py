"""Cores of their own for shards, as on a machine that has cores to spare. Knows Linux's processes, no model.

    cores of the engine   this process, its threads, and all of Ray but the shards
    cores of the shards   the shards

Without it, on a machine of few cores, shards and coordinator take cores from each other, and what is measured is that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self

import psutil

from cluster.errors import ConfigError

SHARD = "ray::ExpertShard"  # what Ray calls their processes


@dataclass(frozen=True, slots=True)
class Cores:
    """Which cores belong to whom."""

    of_engine: tuple[int, ...]
    of_shards: tuple[int, ...]

    @classmethod
    def split(cls, num_of_shards: int) -> Self:
        """The last `num_of_shards` of those we may run on are the shards'. Raises ConfigError where none are left."""
        cores = sorted(os.sched_getaffinity(0))
        if num_of_shards >= len(cores):
            raise ConfigError(f"--shard-cores {num_of_shards}: {len(cores)} cores are here, and the engine needs one")
        return cls(tuple(cores[:-num_of_shards]), tuple(cores[-num_of_shards:]))

    def __str__(self) -> str:
        shards, others = (", ".join(map(str, cores)) for cores in (self.of_shards, self.of_engine))
        return f"shards on cores {shards}, all else on {others}"

    def take_engines(self) -> None:
        """Keep this thread, and those that it starts from now on, on the engine's cores."""
        os.sched_setaffinity(0, self.of_engine)

    @contextmanager
    def started_for_shards(self) -> Iterator[None]:
        """Processes that begin within are on the shards' cores, and count their threads by them.

        At its end all but the shards move to the engine's cores.
        """
        os.sched_setaffinity(0, self.of_shards)
        try:
            yield
        finally:
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with suppress(psutil.Error, OSError):  # one that has ended meanwhile
                    if not (process.cmdline() or [""])[0].startswith(SHARD):
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, self.of_engine)
