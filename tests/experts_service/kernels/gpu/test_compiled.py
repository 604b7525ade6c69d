"""Triton compiles for cards that are not here: that the kernels do compile, and fit each kind of card."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from experts_service.kernels.gpu.matrices import INT8, PLAIN
from tests.programs import REPOSITORY, program

# The shared memory that a block of threads may have, in KiB: A100, A10 and L4, H100, B200.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_products_compile_for_a_card_that_is_not_here(tmp_path: Path, capability: int) -> None:
    """The interpreter took what the compiler refused. Registers are enough where weights are read and rows are few."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        program("experts_service.compile_products", str(capability)),
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    launched = {(one["kind"], one["rows"]): one["launched"] for one in found}
    assert launched[INT8, 2] == 3, "the parts of few rows are added up"
    assert launched[PLAIN, 2] == launched[INT8, 1024] == 2
    wide = {90: ["wgmma"], 100: ["tcgen05"]}.get(capability, ["mma"])
    for one in found:
        assert one["shared"] <= SHARED[capability] * 2**10, one
        if one["rows"] == 2 and one["dtype"] != "torch.float32":
            assert one["stack"] == 0, one
        if one["kernel"] == "multiply" and one["dtype"] == "torch.bfloat16":
            assert one["instructions"] == wide, f"the same for few rows and many: {one}"
