"""`manta bench serve`: its arithmetic, and whole runs against a server that answers by a script."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.bench.decode import reference
from cluster.commands.bench.decode.figures import Run
from cluster.commands.bench.decode.reference import Implementation
from cluster.commands.bench.serve.compare import Pair, Rival
from cluster.commands.bench.serve.figures import Outcome, Slo, goodput, percentile, report, summary
from cluster.commands.bench.serve.load import Load
from cluster.demo_model import DIRECTORY as DEMO
from cluster.errors import ConfigError, Unavailable
from tests.cluster.bench_sse_server import SseServer, serving
from tests.ports import free_port


def answered(due: float, ttft: float, tpot: float, tokens: int = 5) -> Outcome:
    times = tuple(due + ttft + i * tpot for i in range(tokens))
    return Outcome(due, times[-1], times, prompt_tokens=3, output_tokens=tokens)


def bench(url: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", "--url", url, *options])


def last_line(result: Result) -> dict[str, Any]:
    line = json.loads(result.stdout.splitlines()[-1])
    assert line["bench"] == "serve"
    return dict(line)


# --- arithmetic


def test_percentiles_lie_between_their_neighbours() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], q) for q in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0]
    assert percentile([7.0], 0.99) == 7.0
    assert summary([float(i) for i in range(101)]) == {
        "mean": 50.0,
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
        "max": 100.0,
    }
    assert summary([]) == {}


def test_times_of_one_request() -> None:
    outcome = answered(1.0, ttft=0.2, tpot=0.05)
    assert outcome.ttft_ms == pytest.approx(200)
    assert outcome.tpot_ms == pytest.approx(50)
    assert outcome.gaps_ms == pytest.approx([50] * 4)
    assert answered(0.0, 0.1, 0.0, tokens=1).tpot_ms is None
    # Two tokens in one piece: fewer gaps, the same time per token.
    assert Outcome(0.0, 0.3, (0.1, 0.3), output_tokens=3).tpot_ms == pytest.approx(100)


def test_goodput_counts_requests_that_keep_both_bounds() -> None:
    outcomes = [
        answered(0.0, 0.1, 0.01),
        answered(0.0, 0.3, 0.01),
        answered(0.0, 0.1, 0.09),
        answered(0.0, 0.1, 0.0, tokens=1),
        Outcome(0.0, 0.01, error="HTTP 503"),
    ]
    assert goodput(outcomes, Slo(200, 50), duration_s=2.0) == 1.0
    assert goodput(outcomes, Slo(ttft_ms=200), duration_s=1.0) == 3.0
    assert goodput(outcomes, Slo(tpot_ms=50), duration_s=1.0) == 3.0
    figures = report(outcomes, Slo(200, 50))
    assert (figures["errors"], figures["errors_by_kind"], figures["slo_attainment"]) == (1, {"HTTP 503": 1}, 0.4)
    assert figures["output_tokens"] == 16


def test_a_report_without_one_answer_has_no_figures() -> None:
    figures = report([Outcome(0.0, 0.1, error="timeout")], Slo())
    assert (figures["ttft_ms"], figures["output_tokens_per_s"], figures["errors"]) == ({}, 0.0, 1)
    assert "slo" not in figures


def test_speedups_are_the_medians_of_those_within_pairs() -> None:
    """What keeps the machine busy for a while does so for both halves of a pair, and not for those of others."""
    rival = Rival(cast(Any, None), Implementation("eager", "sdpa", "eager"), [[1, 2, 3]] * 2, length=5)
    steps_ms = [(10, 20), (20, 10), (40, 30)]  # ours and theirs
    pairs = [
        Pair([answered(0.0, 0.1, ours / 1e3)], Run(0.5, 4 * theirs / 1e3, 4, [[7] * 5] * 2))
        for ours, theirs in steps_ms
    ]
    figures = rival.to_json(pairs)
    assert (figures["pairs"], figures["ttft_ms"], figures["tpot_ms"]) == (3, 500, 20)
    assert figures["tpot_speedup"] == 0.75, "that of the medians is 1"
    rates = [(5 / (0.1 + 4 * ours / 1e3)) / (10 / (0.5 + 4 * theirs / 1e3)) for ours, theirs in steps_ms]
    assert figures["throughput_speedup"] == pytest.approx(sorted(rates)[1], abs=1e-3)


def test_arrivals_are_poisson_and_always_the_same() -> None:
    load = Load(4000, 1, 1, rate=50.0, seed=3)
    times = load.arrivals()
    gaps = [b - a for a, b in pairwise(times)]
    assert load.arrivals() == times
    assert Load(4000, 1, 1, rate=50.0, seed=4).arrivals() != times
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exponential: 1 / e


def test_prompts_differ_between_requests_and_not_between_runs() -> None:
    load = Load(2, 64, 1)
    assert load.prompt(0) == Load(2, 64, 1).prompt(0)
    assert load.prompt(0) != load.prompt(1)
    with pytest.raises(ConfigError, match="not both"):
        Load(1, 1, 1, concurrency=1, rate=1.0)


# --- against the scripted server


def test_figures_are_those_of_the_script(tmp_path: Path) -> None:
    plot, file = tmp_path / "plot.png", tmp_path / "figures.json"
    options = "--requests 6 --concurrency 3 --prompt-tokens 9 --output-tokens 6 --slo-ttft-ms 5000 --slo-tpot-ms 1"
    for _ in range(10):  # whoever shares the machine with the tests is in the way of some
        with serving(SseServer(first_s=0.1, later_s=0.02)) as server:
            result = bench(server.url, *options.split(), "--plot", str(plot), "--json", str(file))
        assert result.exit_code == 0, result.output
        line = last_line(result)
        is_near = 100 <= line["ttft_ms"]["p50"] < 250 and 19 <= line["tpot_ms"]["p50"] < 60
        if is_near and 36 / 2.5 < line["output_tokens_per_s"] < 36 / 0.4:  # two rounds of at least 0.2 s
            break
    else:
        pytest.fail(f"the last of ten: {line}")
    assert (line["prompt_tokens"], line["output_tokens"], line["errors"]) == (54, 36, 0)
    assert (line["goodput_requests_per_s"], line["slo_attainment"]) == (0.0, 0.0)
    assert "TTFT" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())["each"]) == 6
    bodies = server.bodies[1:]  # after the one that warms up
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 7
    assert {(len(b["prompt"]), b["max_tokens"], b["ignore_eos"], b["stream"]) for b in bodies} == {(9, 6, True, True)}


def test_every_kind_of_failure_is_counted_and_shown() -> None:
    faults = {1: "refused", 2: "cut", 3: "error", 4: "short"}
    with serving(SseServer(first_s=0.01, later_s=0.001, faults=faults)) as server:
        result = bench(server.url, "--requests", "6", "--output-tokens", "4", "--prompt-tokens", "2")
    assert result.exit_code == 1
    line = last_line(result)
    assert line["errors"] == 4
    assert line["errors_by_kind"] == {
        "HTTP 503": 1,
        "stream without an end": 1,
        "error in the stream": 1,
        "wrong length": 1,
    }
    assert line["output_tokens"] == 8
    assert "scripted refusal" in result.stdout


def test_a_rate_does_not_wait_for_answers() -> None:
    """The server has none before all ten have come."""
    with serving(SseServer(first_s=0.0, later_s=0.0, together=10)) as server:
        result = bench(server.url, "--requests", "10", "--rate", "100", "--output-tokens", "2", "--prompt-tokens", "2")
    line = last_line(result)
    assert (line["errors"], line["rate"], line["concurrency"]) == (0, 100.0, None)


def test_nobody_there_is_one_error_and_no_run() -> None:
    result = bench(f"http://127.0.0.1:{free_port()}")
    assert isinstance(result.exception, Unavailable)
    result = bench(f"127.0.0.1:{free_port()}", "--grpc")
    assert isinstance(result.exception, Unavailable)


def test_a_server_that_refuses_the_warm_up_is_not_measured() -> None:
    with serving(SseServer(0.0, 0.0, faults={0: "refused"})) as server:
        result = bench(server.url)
    assert "scripted refusal" in str(result.exception)


def test_transformers_run_the_same_work_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "OPENMP_SETTINGS", ({},))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of transformers' process: tests share the cores with others
    options = "--requests 4 --concurrency 2 --prompt-tokens 4 --output-tokens 3 --compare transformers --pairs 2"
    with serving(SseServer(first_s=0.05, later_s=0.02)) as server:
        result = bench(server.url, *options.split(), "--checkpoint", str(DEMO))
    assert result.exit_code == 0, result.output
    line = last_line(result)
    compared = line["transformers"]
    assert (compared["pairs"], line["requests"], line["errors"]) == (2, 4, 0)
    assert compared["ttft_ms"] > 0
    assert compared["tpot_ms"] > 0
    assert compared["tpot_speedup"] > 0
    assert f"{compared['throughput_speedup']:.2f} and" in result.stdout
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 2 * (1 + 4), "no prefix cache helps"
    assert result.stdout.count("model: ") == 1


@pytest.mark.parametrize(
    "options",
    ["--compare transformers", "--checkpoint DEMO", "--rate 1 --compare transformers --checkpoint DEMO"],
)
def test_what_cannot_be_compared_is_said_before_anything_is_sent(options: str) -> None:
    with serving(SseServer(0.0, 0.0)) as server:
        result = bench(server.url, *options.replace("DEMO", str(DEMO)).split())
        assert "--compare" in str(result.exception)
        assert server.bodies == []
