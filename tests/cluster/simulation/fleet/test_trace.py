"""Arrivals: public traces as they are published, and made ones that are the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.simulation.fleet.trace import Arrival, Synthetic, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2024-05-10 00:00:00.009930+00:00,110,27
"""
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,Conversation log
"""


def written(directory: Path, text: str) -> Path:
    file = directory / "trace.csv"
    file.write_text(text)
    return file


def test_azures_traces_are_read(tmp_path: Path) -> None:
    first, second, third = read_trace(written(tmp_path, AZURE))
    assert first == Arrival(0.0, 4808, 10)
    assert second.at_s == pytest.approx(0.052, abs=1e-5)
    assert (second.prompt_tokens, second.output_tokens) == (3180, 8)
    assert third.at_s == pytest.approx(175 * 86400 + (24 - 18) * 3600 - 17 * 60 - 3.97, abs=0.1), "to the next May"


def test_burst_gpts_are_read_without_what_failed(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, BURST_GPT)) == [Arrival(0.0, 472, 18), Arrival(113.0, 417, 276)]


def test_twice_as_many_come_in_the_same_time(tmp_path: Path) -> None:
    rows = "\n".join(f"{at},{at},100,10" for at in range(1000))
    file = written(tmp_path, "timestamp,id,prompt_tokens,output_tokens\n" + rows)
    assert len(read_trace(file, 2.0)) == 2000
    assert read_trace(file, 2.0)[-1].at_s < 1000
    assert 400 < len(read_trace(file, 0.5)) < 600
    moments = [arrival.at_s for arrival in read_trace(file, 3.0)]
    assert moments == sorted(set(moments)), "no two at once"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,prompt_tokens\n1,2\n", "no column of output"),
        ("time,prompt_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3"),
        ("time,prompt_tokens,output_tokens\nnoon,2,3\n", "line 2"),
        ("time,prompt_tokens,output_tokens\n", "no request"),
    ],
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(written(tmp_path, text))


def test_made_arrivals_are_as_many_and_as_long_as_was_said() -> None:
    made = Synthetic.parse("rate=5,hours=24,bursts=0,prompt=300,output=50").arrivals(3)
    assert len(made) == pytest.approx(5 * 86400, rel=0.01)
    assert sum(one.prompt_tokens for one in made) / len(made) == pytest.approx(300, rel=0.02)
    assert sum(one.output_tokens for one in made) / len(made) == pytest.approx(50, rel=0.02)
    night, day = (sum(1 for one in made if at * 3600 <= one.at_s < (at + 1) * 3600) for at in (2, 14))
    assert day / night == pytest.approx(1.6 / 0.4, rel=0.1), "the swing is 0.6 of the average"


def test_bursts_bring_more() -> None:
    quiet = Synthetic.parse("rate=2,hours=24,bursts=0").arrivals(3)
    loud = Synthetic.parse("rate=2,hours=24,bursts=10,burst_factor=5,burst_s=600").arrivals(3)
    assert 1.05 < len(loud) / len(quiet) < 1.8


def test_a_seed_makes_the_same_and_another_one_others() -> None:
    synthetic = Synthetic.parse("rate=2,hours=1")
    assert synthetic.arrivals(1) == synthetic.arrivals(1)
    assert synthetic.arrivals(1) != synthetic.arrivals(2)


@pytest.mark.parametrize("text", ["speed=3", "rate=fast", "rate=0", "swing=2", "rate=nan"])
def test_what_cannot_arrive_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--synthetic"):
        Synthetic.parse(text)
