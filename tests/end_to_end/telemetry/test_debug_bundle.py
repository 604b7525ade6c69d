"""`manta debug bundle` beside a running server."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile


def test_what_runs_is_in_it(server, tmp_path):
    file = tmp_path / "bundle.tar.gz"
    command = [sys.executable, "-m", "cluster.cli", "debug", "bundle", str(file)]
    command += ["--address", server.ray_address, "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("not in it")] == [
        "not in it: configuration: give --config, if there is one"
    ]
    with tarfile.open(file) as archive:
        found = {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}
    assert json.loads(found["manta-debug/health.json"])["status"] == "ok"
    assert b"vllm:num_requests_running" in found["manta-debug/metrics.txt"]
    status = json.loads(found["manta-debug/status.json"])
    assert "mistral-small" in {application["model"] for application in status["applications"]}
    assert status["findings"] == []
    assert any(name.startswith("manta-debug/logs/serve/") for name in found)
    stacks = [content for name, content in found.items() if name.startswith("manta-debug/stacks/")]
    assert any(b"coordinator" in stack and b"Thread" in stack for stack in stacks)
