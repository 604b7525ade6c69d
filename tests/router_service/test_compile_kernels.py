"""What `manta serve` compiles beside Ray's start: all that the processes of a model call, and that only once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experts_service.kernels.compiled import jit
from tests.programs import said_by

pytestmark = [
    pytest.mark.long,  # it compiles all of them
    pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported"),
]


def test_a_coordinator_finds_all_of_its_kernels_compiled_and_the_second_start_nothing_to_do(tmp_path: Path) -> None:
    """Three coordinators and two shards compiled on two cores while they loaded: a first start took 20 s longer."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    assert (
        said_by("router_service.compile_twice", environment=environment, timeout_s=300)
        == "0 kernels compiled after it\nno torch\n"
    )
