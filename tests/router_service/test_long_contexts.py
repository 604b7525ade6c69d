"""A step of long contexts leaves nothing behind: resident memory stays what it is, however many steps are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.setup import BLOCK_SIZE
from cluster.commands.bench.make_model import write_model
from cluster.commands.bench.shapes import BENCH
from tests.checkpoints import write_checkpoint
from tests.router_service.long_contexts import LongContexts

MIB = 2**20


def test_steps_leave_nothing_behind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    sequences = LongContexts(tmp_path, Workload.after_context(4, 100, 125), num_threads=1)
    readings = sequences.resident_bytes(120, every=20)
    assert sequences.engine.stats().prompt_tokens_total <= 4 * BLOCK_SIZE  # of each, what is no whole block
    assert sequences.engine.stats().generation_tokens_total == 4 * 120
    assert max(readings[2:]) - readings[1] < 4 * MIB


@pytest.mark.long
def test_a_thousand_steps_of_64_sequences_of_8192_tokens_leave_nothing_behind(tmp_path: Path) -> None:
    """4.3 GB of keys and values, of the benchmarks' model."""
    write_model(BENCH, tmp_path / "model")
    sequences = LongContexts(tmp_path / "model", Workload.after_context(64, 8192, 1010))
    readings = sequences.resident_bytes(1001, every=50)
    assert max(readings[2:]) - readings[1] < 64 * MIB
