"""Drains nodes of a Ray cluster of its own while a stream runs there; says what it saw, as JSON.

A process of its own, because a process joins one Ray cluster, and the session has one.
"""

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.cluster_utils import Cluster

from cluster.commands.k8s.drain import replicas
from tests.programs import program

NOBODY = "http://127.0.0.1:1"
directory = sys.argv[1]

ensure_token_if_auth_enabled(create_token_if_missing=True)
ray_cluster = Cluster()
head = ray_cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80_000_000)
workers = [ray_cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(3)]
ray.init(address=ray_cluster.address, log_to_driver=False, logging_level="error")
serve.start(proxy_location="Disabled")  # port 8000 is somebody's, perhaps


def drain(timeout_s, node_id):
    command = program("cluster.drain_node", timeout_s, ray_cluster.address, node_id, NOBODY)
    pods = os.environ | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}  # as theirs is, for handles as well
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=pods)


def outcome(draining):
    return [said.strip() for said in draining.communicate(timeout=120)]


def is_controller(process):
    """Serve's, of this cluster: the tests' server has one as well."""
    if not (process.info["cmdline"] or [""])[0].startswith("ray::ServeController"):
        return False
    try:
        return process.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]
    except psutil.NoSuchProcess:  # another test's, which has ended
        return False


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


def deployment(name):
    """One replica, which takes a node for itself, streams as long as it is to, and ends watches as a gateway does."""

    @serve.deployment(
        name=name,
        num_replicas=1,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
    )
    class Stream:
        def __init__(self):
            self.over = threading.Event()

        def watch(self):
            while not self.over.is_set():
                yield
                time.sleep(0.1)

        def end_watches(self):
            self.over.set()

        def __call__(self, end):
            while not os.path.exists(end):
                yield ray.get_runtime_context().get_node_id()
                time.sleep(0.1)

    return Stream.bind()


def node_of(name):
    """Of its newest replica."""
    return [one.node_id for one in replicas() if one.deployment == name][-1]


def end(name):
    open(os.path.join(directory, name), "w").close()


serve.run(deployment("expert-0"), name="model", route_prefix=None)
handle = serve.run(deployment("gateway"), name="gateway", route_prefix=None).options(stream=True)
of_expert = node_of("expert-0")
stream = handle.remote(os.path.join(directory, "first"))
first = next(stream)
draining = drain(120, first)
wait_for(lambda: len(replicas()) == 3)  # the replacement, where the old one still streams
time.sleep(2)
still_waiting = draining.poll() is None
end("first")
nodes = [first, *stream]
drained, _ = outcome(draining)

stream = handle.remote(os.path.join(directory, "second"))
second = next(stream)
[controller] = [one for one in psutil.process_iter(["cmdline"]) if is_controller(one)]
controller.suspend()
draining = drain(20, second)
beside_silence = outcome(draining)
controller.resume()
end("second")
list(stream)

# No node is left that drains not, and nothing streams; a pod may come and take over, unless the head goes, too.
gateway, expert = drain(120, second), drain(120, of_expert)
time.sleep(8)
waiting = [gateway.poll(), expert.poll()]
stream = handle.remote(os.path.join(directory, "third"))
next(stream)
watch = handle.watch.remote()
next(watch)
head_draining = drain(120, head.node_id)
time.sleep(8)
waiting += [gateway.poll(), expert.poll(), head_draining.poll()]
end("third")
list(stream)
taken_away = [outcome(gateway)]
waiting += [expert.poll(), head_draining.poll()]


def remove(node_id):
    ray_cluster.remove_node(next(worker for worker in workers if worker.node_id == node_id))


remove(second)
taken_away.append(outcome(expert))
waiting.append(head_draining.poll())
remove(of_expert)
remove(first)
taken_away.append(outcome(head_draining))
print(
    json.dumps(
        {
            "still_waiting": still_waiting,
            "nodes": nodes,
            "drained": drained,
            "second": second,
            "beside_silence": beside_silence,
            "waiting": waiting,
            "taken_away": taken_away,
        }
    )
)
