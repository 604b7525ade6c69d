"""Serve and an application on the cluster at an address, until standard input ends.

Arguments: the address and Serve's port.
"""

import sys

import ray
from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Theirs:
    def __call__(self, _request: object) -> str:
        return "theirs"


ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
serve.start(http_options={"port": int(sys.argv[2])})
serve.run(Theirs.bind(), name="theirs")
print("up", flush=True)
sys.stdin.read()
serve.shutdown()
