"""The figures of steps, as /metrics shows them."""

from prometheus_client import CollectorRegistry

from router_service.engine_metrics import StepHistograms


def test_the_longest_step_is_kept():
    registry = CollectorRegistry()
    observe = StepHistograms(registry)
    for seconds in (0.02, 1.5, 0.3):
        observe(seconds, 4)
    assert registry.get_sample_value("manta_longest_step_seconds") == 1.5
    assert registry.get_sample_value("manta_step_seconds_count") == 3
