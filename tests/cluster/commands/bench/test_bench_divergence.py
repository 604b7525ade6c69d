"""`manta bench divergence`: its arithmetic, and a whole run in fp32, where nothing diverges."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.bench.divergence import Comparison


def test_a_text_counts_up_to_its_first_difference() -> None:
    ours = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    theirs = [[1, 2, 3, 4], [1, 9, 3, 9], [9, 2, 3, 4]]
    comparison = Comparison.of("ours", ours, "theirs", theirs)
    assert comparison.firsts == (None, 1, 0)
    assert comparison.num_equal == 1
    assert comparison.rate == 2 / (4 + 2 + 1)  # differences, over tokens that could have been the first


@pytest.mark.long
def test_keys_and_values_in_8_bits_are_compared_with_plain_ones() -> None:
    options = "--prompts 2 --prompt-tokens 8 --output-tokens 6 --batch 2 --kv-cache-dtype int8"
    result = CliRunner().invoke(app, ["bench", "divergence", *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    against = {(row["name"], row["against"]) for row in line["results"]}
    assert ("Manta bfloat16, keys and values int8", "Manta bfloat16") in against
    assert ("Manta bfloat16, keys and values int8", "transformers float32") in against


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_the_demo_model(dtype: str) -> None:
    options = f"--prompts 3 --prompt-tokens 8 --output-tokens 6 --batch 2 --dtype {dtype}"
    result = CliRunner().invoke(app, ["bench", "divergence", *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[-1])
    against = [(row["name"], row["against"]) for row in line["results"]]
    assert against[:2] == [
        (f"Manta {dtype}", "transformers float32"),
        (f"transformers {dtype}", "transformers float32"),
    ]
    assert [row["prompts"] for row in line["results"]] == [3] * 5
    if dtype == "float32":
        assert [row["equal"] for row in line["results"]] == [3] * 5
