from ray.experimental import internal_kv

from cluster.telemetry.progress import LoadingProgress, Progress, clear_progress, read_progress
from tests.programs import said_by


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


def test_other_processes_read_what_is_published_per_application():
    """In a process of its own, so that this one's Ray is left alone."""
    said_by("cluster.loading_progress")
