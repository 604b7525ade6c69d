"""Every family with experts, in 2 and in 4 processes, and while one of them is killed: the ids are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.planning.placement import plan_groups
from router_service.dispatcher import Dispatcher
from tests import families
from tests.checkpoints import write_checkpoint
from tests.models_table import told
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.shard_processes import shard_processes
from tests.transformers_families import generated, prompt, write_family

NEW_TOKENS = 64
LENGTHS = (40, 5, 23)
STEPS_BEFORE_THE_KILL = 20
NATIVE = ("mixtral", "qwen3_moe", "qwen3_moe-128", "olmoe", "qwen2_moe", "granitemoe")
SHORT = ("olmoe", "gpt_oss")  # one of ours, one by transformers' code: in `make test`


def requests() -> list[Any]:
    return [
        make_request(prompt(length, length), max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True)
        for length in LENGTHS
    ]


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "lane_secret"
    file.touch(0o600)
    file.write_text("s" * 64)
    return file


def cases(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", cases(NATIVE))
def test_families_of_ours(tmp_path: Path, secret_file: Path, name: str) -> None:
    directory = tmp_path / "model"
    if name == "mixtral":
        model: Any = write_checkpoint(directory)
    else:
        model = families.random_model(name)
        families.write_model(directory, model)
    assert open_checkpoint(directory).model_impl == "native"
    say_the_same(directory, secret_file, model)


@pytest.mark.parametrize("family", cases(tuple(family for family, row in told().items() if "| yes |  |" in row)))
def test_families_by_transformers_code(tmp_path: Path, secret_file: Path, family: str) -> None:
    say_the_same(tmp_path / "model", secret_file, write_family(tmp_path / "model", family), "transformers")


def say_the_same(directory: Path, secret_file: Path, model: Any, model_impl: Any = "auto") -> None:
    """Of a checkpoint and what transformers has of it."""
    checkpoint = open_checkpoint(directory, model_impl)
    expected = [generated(model, prompt(length, length), NEW_TOKENS) for length in LENGTHS]
    for number in (2, 4):
        groups = plan_groups("auto", checkpoint.architecture.num_experts, number, 1)
        with shard_processes(checkpoint, groups, secret_file) as shards:
            dispatcher = Dispatcher(groups, shards.transport())
            bench = Bench(
                directory, model_impl=model_impl, dtype="float32", dispatcher=dispatcher, max_num_batched_tokens=17
            )
            assert bench.run(*requests()) == expected, f"in {number} processes"
            disturbed = requests()
            bench.add(*disturbed)
            for _ in range(STEPS_BEFORE_THE_KILL):
                bench.engine.step()
            next(iter(shards.processes.values())).kill()
            bench.run()
            assert [bench.token_ids(request) for request in disturbed] == expected, f"one of {number} was killed"
            assert not bench.errors
            dispatcher.close()
