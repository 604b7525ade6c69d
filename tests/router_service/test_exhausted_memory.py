"""A real process whose memory runs out, by the limit that the system puts on its address space."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.checkpoints import write_checkpoint

PROGRAM = """
import json
import os
import resource
import sys
from pathlib import Path

import psutil

from tests.router_service.engines import Bench
from tests.router_service.requests import make_request
from tests.waiting import wait_for

def say(**figures):
    print(json.dumps(figures), flush=True)

def tell(name, request):
    error = bench.errors.get(request.key)
    say(request=name, error=type(error).__name__ if error else "", tokens=len(bench.token_ids(request)))

def ask(name, length):
    request = make_request([3 + i % 900 for i in range(length)], max_tokens=4, ignore_eos=True)
    bench.engine.submit(request)
    def ended():
        return request.key in bench.errors or len(bench.token_ids(request)) == 4
    wait_for(ended, 60, name)
    tell(name, request)

def die():
    say(died=True)
    os._exit(7)

sizes = {"max_model_len": 8192, "max_num_batched_tokens": 8192, "num_kv_blocks": 128, "block_size": 64}
bench = Bench(Path(sys.argv[1]), prefix_caching=False, dtype="float32", **sizes)
bench.engine._on_death = die
bench.engine.start()
ask("before", 8)
limit = psutil.Process().memory_info().vms + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
hoard = []
try:
    while sys.argv[2] == "hoard":
        hoard.append(bytes(2**20))  # also what is free within the process
except MemoryError:
    pass
ask("large", 8000)
ask("small", 8)
say(lives=True)
bench.engine.stop()
"""


def run(directory, what):
    """What the program says, and how it ends. `hoard`: all memory but some kilobytes is taken for good."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), what],
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
