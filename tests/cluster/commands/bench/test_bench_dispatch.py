"""`manta bench dispatch`: real shards in processes, over each transport."""

import json
import subprocess
import sys
from pathlib import Path

TRANSPORTS = ("memory", "lane", "object_store", "auto", "local")


def test_every_transport_is_timed_and_the_bare_bytes_beside_them(tmp_path):
    manta, plot = Path(sys.executable).with_name("manta"), tmp_path / "cost.png"
    arguments = ["--rows", "1", "--rows", "3", "--groups", "2", "--hidden", "256", "--repeats", "5"]
    arguments += [part for name in TRANSPORTS for part in ("--transport", name)]
    done = subprocess.run(
        [manta, "bench", "dispatch", *arguments, "--plot", plot, "--profile"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["bench"] == "dispatch"
    seen = {(one["transport"], one["rows"], one["groups"]) for one in document["results"]}
    assert seen == {(name, rows, 2) for name in (*TRANSPORTS, "bare") for rows in (1, 3)}
    assert all(0 < one["p50_us"] <= one["p99_us"] for one in document["results"])
    assert "memory, 2 × 3: calls here" in done.stdout
    _, _, of_shard = done.stdout.partition("memory, 2 × 3: calls in a shard")
    assert "shard.py _run" in of_shard
    assert "_resume_span" not in of_shard.partition("calls here")[0], "Ray's traces are of calls of the actor alone"
    assert "connection.py receive" in done.stdout
    assert "method 'sendmsg'" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
