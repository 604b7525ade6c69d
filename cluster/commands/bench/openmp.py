"""Loads torch as a coordinator does. OpenMP reads how long its threads spin when it is loaded, and never again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SPIN_COUNT = "GOMP_SPINCOUNT"


def load_torch(spin_count: int) -> None:
    """Import torch with that spin count. Other processes, started later, do not inherit it."""
    with environment({SPIN_COUNT: str(spin_count)}):
        import torch  # noqa: F401


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set for the time of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
