"""A real process whose memory runs out, by the limit that the system puts on its address space."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.checkpoints import write_checkpoint
from tests.programs import REPOSITORY, program


def run(directory, what):
    """What the program says, and how it ends. `hoard`: all memory but some kilobytes is taken for good."""
    done = subprocess.run(
        program("router_service.exhaust_memory", directory, what),
        cwd=REPOSITORY,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # no thread has memory aside
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, hidden_size=512, intermediate_size=1024, vocab_size=1000, max_position_embeddings=8192)
    return directory


def test_a_request_too_large_for_what_is_left_ends_alone(directory):
    said, status, errors = run(directory, "spare")
    assert said == [
        {"request": "before", "error": "", "tokens": 4},
        {"request": "large", "error": "StepFailed", "tokens": 0},
        {"request": "small", "error": "", "tokens": 4},
        {"lives": True},
    ], errors
    assert status == 0


def test_memory_that_stays_exhausted_ends_the_process(directory):
    """It was up, and could not serve; Serve replaces only what is gone, or fails its health checks."""
    said, status, errors = run(directory, "hoard")
    assert said == [
        {"request": "before", "error": "", "tokens": 4},
        {"request": "large", "error": "StepFailed", "tokens": 0},
        {"died": True},
    ] or said[1:] == [{"died": True}], errors  # the engine's thread may be the first
    assert status == 7
