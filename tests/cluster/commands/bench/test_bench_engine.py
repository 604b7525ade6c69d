"""`manta bench engine`: every part of a step is timed, they add up, and the classes are as before afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.bench.engine.parts import BENCHMARK, METHODS, NAMES, Parts
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


def test_contexts_stand_side_by_side() -> None:
    before = [getattr(owner, name) for owner, name, _ in METHODS]
    options = "--batch 2 --context 20 --context 40 --steps 3"
    result = CliRunner().invoke(app, ["bench", "engine", *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    assert [(row["batch"], row["context"], row["steps"]) for row in line["results"]] == [(2, 20, 3), (2, 40, 3)]
    for row in line["results"]:
        assert list(row["parts_ms"]) == list(NAMES)
        assert all(ms > 0 for ms in row["parts_ms"].values()), "a part that never runs is no part"
        assert row["ms_per_step"] == pytest.approx(sum(row["parts_ms"].values()), abs=0.01)
        assert 0 < row["python_ms"] < row["ms_per_step"]
    assert "20: ms" in result.stdout
    assert "40: ms" in result.stdout
    assert [getattr(owner, name) for owner, name, _ in METHODS] == before


@pytest.mark.parametrize("dense", [False, True])
def test_parts_are_all_of_a_step_and_count_nothing_twice(tmp_path: Path, dense: bool) -> None:
    write_checkpoint(tmp_path, dense=dense)
    bench = Bench(tmp_path)
    parts = Parts()
    bench.add(make_request(range(5, 25), max_tokens=3, ignore_eos=True))
    with parts.timed():
        for _ in range(3):
            bench.engine.step()
    assert [step.num_decoding for step in parts.steps] == [0, 1, 1]
    for step in parts.steps:
        assert step.seconds.keys() - {BENCHMARK} == set(NAMES)
        assert all(seconds > 0 for seconds in step.seconds.values())
