import subprocess
import sys

from cluster.telemetry.progress import LoadingProgress, Progress, clear_progress, read_progress

PROGRAM = """
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
assert other.deployment == "expert-1" and other.loaded_bytes <= 7
clear_progress("app")
assert read_progress("app") == []
assert read_progress("app-2") == [other]
ray.shutdown()
"""


def test_progress_says_bytes_in_a_readable_unit():
    assert str(Progress("expert-1", 1_240_000_000, 2_900_000_000)) == "expert-1: 1.2 of 2.9 GB"
    assert str(Progress("coordinator", 0, 3_000_000)) == "coordinator: 0.0 of 3.0 MB"


def test_without_ray_publishing_does_nothing():
    progress = LoadingProgress("app", "expert-0", 10)
    progress(10)
    assert progress.loaded_bytes == 10
    assert read_progress("app") == []
    clear_progress("app")


def test_other_processes_read_what_is_published_per_application():
    """In a process of its own, so that this one's Ray is left alone."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
