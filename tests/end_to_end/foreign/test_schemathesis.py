"""schemathesis on our own OpenAPI document, against a real server: no 5xx, bad input rejected, answers as described."""

from __future__ import annotations

import json

import httpx
import pytest

from cluster.demo_model import DIRECTORY
from tests.conftest import running_server
from tests.environments import make_environment, run_in
from tests.processes import processes

SECONDS = 120


@pytest.mark.long
def test_two_minutes_of_generated_requests(tmp_path):
    python = make_environment(tmp_path / "environment", "schemathesis>=4.32,<5")
    engine = {"max_model_len": 96}  # short answers: many requests
    config = {"models": [{"name": "demo", "path": str(DIRECTORY), "engine": engine}]}
    with running_server(json.dumps(config)) as server:
        before = coordinators(server)
        run_in(
            python.with_name("schemathesis"),
            *("run", f"{server.url}/openapi.json", "--max-time", str(SECONDS), "--workers", "2"),
            *("--request-timeout", "60", "--no-color"),
            # Bounds that depend on the model and on other fields are no part of the document.
            *("--exclude-checks", "positive_data_acceptance"),
            timeout_s=10 * SECONDS,
        )
        assert coordinators(server) == before
        assert httpx.get(f"{server.url}/load", timeout=30).json() == {"server_load": 0}


def coordinators(server):
    """(process id, start time) of each."""
    found = [(process.pid, process.create_time()) for process in processes(server, "ServeReplica:demo")]
    assert found
    return sorted(found)
