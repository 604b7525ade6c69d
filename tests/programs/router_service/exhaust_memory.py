"""An engine whose process runs out of memory, for good where the second argument is `hoard`; says what comes of it."""

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
