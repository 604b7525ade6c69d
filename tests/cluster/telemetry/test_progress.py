from ray.experimental import internal_kv

from cluster.telemetry.progress import LoadingProgress, Progress, clear_progress, read_progress


def test_progress_says_bytes_in_a_readable_unit():
    assert str(Progress("expert-1", 1_240_000_000, 2_900_000_000)) == "expert-1: 1.2 of 2.9 GB"
    assert str(Progress("coordinator", 0, 3_000_000)) == "coordinator: 0.0 of 3.0 MB"


def test_without_ray_publishing_does_nothing(monkeypatch):
    """Where another test has left this process a driver of Ray, it is as if it were none."""
    monkeypatch.setattr(internal_kv, "_internal_kv_initialized", lambda: False)
    progress = LoadingProgress("app", "expert-0", 10)
    progress(10)
    assert progress.loaded_bytes == 10
    assert read_progress("app") == []
    clear_progress("app")


def test_other_processes_read_what_is_published_per_application(ray_cluster):
    import ray

    @ray.remote(num_cpus=0)
    def load(application, deployment, nbytes):
        progress = LoadingProgress(application, deployment, 100)
        for _ in range(nbytes):
            progress(1)

    loads = [("app", "expert-1", 100), ("app", "coordinator", 0), ("app-2", "expert-1", 7)]
    ray.get([load.remote(*arguments) for arguments in loads], timeout=120)
    assert read_progress("app") == [Progress("coordinator", 0, 100), Progress("expert-1", 100, 100)]
    (other,) = read_progress("app-2")
    assert other.deployment == "expert-1"
    assert other.loaded_bytes <= 7
    clear_progress("app")
    assert read_progress("app") == []
    assert read_progress("app-2") == [other]
    clear_progress("app-2")
