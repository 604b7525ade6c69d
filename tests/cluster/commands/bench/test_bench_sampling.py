"""`manta bench sampling`: every wish by itself, and all of them."""

import json
import time

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from experts_service.kernels.cores import cores
from router_service.sampling.sampler import Sampler


@pytest.fixture(autouse=True)
def same_threads():
    """The benchmark sets them for its process."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_each_wish_is_timed_beside_the_greedy_choice():
    result = CliRunner().invoke(
        app, ["bench", "sampling", "--rows", "2", "--vocabulary", "500", "--rounds", "2"], catch_exceptions=False
    )
    assert result.exit_code == 0
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["bench"], document["rows"], document["vocabulary"]) == ("sampling", 2, 500)
    times = {one["wish"]: one["ms"] for one in document["results"]}
    assert {"greedy", "temperature", "top_p", "top_k", "min_p", "logit_bias", "logprobs", "all"} <= times.keys()
    assert 0 < times["greedy"] < times["all"]
    assert all(one["cpu_ms"] > 0 for one in document["results"])


def test_a_wish_costs_what_a_step_waits_for_it(monkeypatch):
    """CPU time of one thread was told as its cost, while others had half of the rows: 1.7 ms looked like 0.9."""

    def slow(_sampler, _logits, sequences):
        time.sleep(0.02)  # as long as another thread works
        return [0] * len(sequences), []

    monkeypatch.setattr(Sampler, "__call__", slow)
    result = CliRunner().invoke(app, ["bench", "sampling", "--rows", "1", "--vocabulary", "200", "--rounds", "1"])
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["threads"] == cores()
    assert all(one["ms"] >= 20 > one["cpu_ms"] for one in document["results"])
