"""A cluster of this package's own, until the suite has one for all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")
    import ray.serve


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["PYTHONPATH"] = root
    ray.init(num_cpus=4, include_dashboard=False, logging_level="warning", log_to_driver=False)
    yield
    ray.shutdown()
