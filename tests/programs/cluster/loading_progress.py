"""Processes of a Ray of its own publish how far they are, and this one reads it."""

import ray

from cluster.telemetry.progress import LoadingProgress, Progress, clear_progress, read_progress

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)


@ray.remote(num_cpus=0)
def load(application, deployment, nbytes):
    progress = LoadingProgress(application, deployment, 100)
    for _ in range(nbytes):
        progress(1)


loads = [("app", "expert-1", 100), ("app", "coordinator", 0), ("app-2", "expert-1", 7)]
ray.get([load.remote(*arguments) for arguments in loads])
assert read_progress("app") == [Progress("coordinator", 0, 100), Progress("expert-1", 100, 100)], read_progress("app")
(other,) = read_progress("app-2")
assert other.deployment == "expert-1"
assert other.loaded_bytes <= 7
clear_progress("app")
assert read_progress("app") == []
assert read_progress("app-2") == [other]
ray.shutdown()
