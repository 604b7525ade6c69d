"""`manta bench sampling`: every wish by itself, and all of them."""

import json

import pytest
from typer.testing import CliRunner

from cluster.cli import app


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
