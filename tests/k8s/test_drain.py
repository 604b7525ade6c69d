"""`manta k8s drain` on a real cluster of several nodes: work goes elsewhere first, and streams end by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cluster.commands.k8s.drain import streams_of_haproxy

TIMEOUT_S = 240

# A process of its own, because a process joins one Ray cluster, and the session has one.
PROGRAM = """
import json, os, subprocess, sys, time
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from cluster.commands.k8s import drain as k8s_drain
from cluster.commands.k8s.drain import replicas_on

k8s_drain.ALL_TOLD_S = 1.0  # nobody else is told here
DRAIN = "import sys; from cluster.commands.k8s.drain import run; print(run(float(sys.argv[1]), *sys.argv[2:]))"
NOBODY = "http://127.0.0.1:1"
directory = sys.argv[1]

ensure_token_if_auth_enabled(create_token_if_missing=True)
ray_cluster = Cluster()
head = ray_cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80_000_000)
workers = [ray_cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
ray.init(address=ray_cluster.address, log_to_driver=False, logging_level="error")

def drain(timeout_s, node_id):
    command = [sys.executable, "-c", DRAIN, str(timeout_s), ray_cluster.address, node_id, NOBODY]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

def outcome(draining):
    return draining.communicate(timeout=120)[0].strip()

def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)

@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=60,
                  graceful_shutdown_wait_loop_s=0.1, health_check_period_s=1)
class Stream:
    def __call__(self, end):
        while not os.path.exists(end):
            yield ray.get_runtime_context().get_node_id()
            time.sleep(0.1)

def end(name):
    open(os.path.join(directory, name), "w").close()

handle = serve.run(Stream.bind(), route_prefix=None).options(stream=True)
stream = handle.remote(os.path.join(directory, "first"))
first = next(stream)
other = next(worker.node_id for worker in workers if worker.node_id != first)
draining = drain(120, first)
wait_for(lambda: replicas_on(other))  # the replacement, where the old one still streams
time.sleep(2)
still_waiting = draining.poll() is None
end("first")
nodes = [first, *stream]
drained = outcome(draining)

stream = handle.remote(os.path.join(directory, "second"))
second = next(stream)
too_short = k8s_drain._drain(time.monotonic(), second, NOBODY)
end("second")
list(stream)

for worker in workers:  # a cluster that is taken away: its head goes last
    ray_cluster.remove_node(worker)
print(json.dumps({
    "still_waiting": still_waiting, "nodes": nodes, "drained": drained, "second": second, "too_short": too_short,
    "of_head": k8s_drain._drain(time.monotonic() + 60, head.node_id, NOBODY),
}))
"""


def test_a_stream_ends_by_itself_and_the_next_one_is_elsewhere(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_SERVE_THROUGHPUT_OPTIMIZED"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env={**environment, "RAY_TMPDIR": "/tmp/manta-drain", "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["still_waiting"], "the pod is kept while its stream goes on, though the replacement is up"
    assert seen["drained"] == "True"
    assert set(seen["nodes"]) == {seen["nodes"][0]}
    assert seen["second"] != seen["nodes"][0]
    assert seen["too_short"] is False
    assert seen["of_head"] is True


@contextmanager
def haproxy_statistics(rows: list[str]) -> Iterator[str]:
    """A page as HAProxy writes it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = "\n".join(["# pxname,svname,qcur,qmax,scur,smax", *rows]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/stats;csv"
        server.shutdown()
        thread.join()


def test_streams_that_haproxy_carries_are_counted_once() -> None:
    rows = ["http,FRONTEND,,,7,9", "default,replica-1,0,0,2,3", "default,replica-2,0,0,1,3", "default,BACKEND,0,0,3,3"]
    with haproxy_statistics(rows) as url:
        assert streams_of_haproxy(url) == 3
    assert streams_of_haproxy(url) == 0, "where no HAProxy runs there are none"
