"""The figures of steps, as /metrics shows them."""

import time

from prometheus_client import CollectorRegistry

from cluster.planning.placement import ExpertGroup
from cluster.telemetry.kernels import ProcessKernels
from cluster.telemetry.metrics import DispatchCounts, exposition, labelled
from router_service.telemetry.engine_metrics import (
    EngineMetrics,
    RequestHistograms,
    StepHistograms,
    expert_families,
)
from tests.checkpoints import write_checkpoint
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request


def test_the_longest_step_is_kept():
    registry = CollectorRegistry()
    observe = StepHistograms(registry)
    for seconds in (0.02, 1.5, 0.3):
        observe(seconds, 4)
    assert registry.get_sample_value("manta_longest_step_seconds") == 1.5
    assert registry.get_sample_value("manta_step_seconds_count") == 3


def test_the_time_of_an_answer_is_cut_into_waiting_prompt_and_tokens(tmp_path):
    """With one place in the batch, the second request waits for all of the first. One that is resumed counts again."""
    write_checkpoint(tmp_path, dense=True)
    registry = CollectorRegistry()
    bench = Bench(tmp_path, max_num_seqs=1, max_num_batched_tokens=16)
    observe = RequestHistograms(registry)
    inference_after_steps = []

    def total(name, suffix="sum"):
        return registry.get_sample_value(f"vllm:request_{name}_time_seconds_{suffix}")

    def observe_step(_seconds, batch):
        observe(batch)
        inference_after_steps.append(total("inference"))

    bench.engine._observe_step = observe_step

    began = time.perf_counter()
    bench.run(make_request(range(3, 43), max_tokens=8, ignore_eos=True))
    alone = total("inference")
    assert 0 < total("queue") < time.perf_counter() - began - alone
    assert 0 < total("prefill") < alone, "three chunks of the prompt"
    assert 0 < total("decode") < alone
    assert abs(total("prefill") + total("decode") - alone) < 1e-9
    bench.run(
        make_request(range(3, 43), max_tokens=8, ignore_eos=True),
        make_request(range(3, 43), max_tokens=8, ignore_eos=True),
    )
    first = min(seconds for seconds in inference_after_steps if seconds > alone) - alone
    assert total("queue") >= first, "the second waited as long as the first took"
    assert {total(name, "count") for name in ("queue", "prefill", "decode", "inference")} == {3}
    bench.run(make_request(range(3, 43), pooling="mean"))
    assert total("queue", "count") == 3, "an embedding has no tokens"


def test_how_the_cache_is_set_up_is_in_labels(tmp_path):
    write_checkpoint(tmp_path, dense=True)
    engine = Bench(tmp_path).engine
    metrics = EngineMetrics("r", (), {})
    kernels = ProcessKernels("float32", "torch", False, "znver4")
    metrics.watch(engine.stats, {"block_size": 16, "enable_prefix_caching": True}, kernels)
    families = {family.name: family for family in metrics.collect()}
    assert families["manta_kernels_info"].samples[0].labels["matmuls"] == "torch"
    [sample] = families["vllm:cache_config_info"].samples
    assert (sample.value, sample.labels) == (1, {"block_size": "16", "enable_prefix_caching": "True"})


def test_hundreds_of_experts_take_little_of_the_page():
    """A line for each, of one coordinator: DeepSeek-V3 on eight machines."""
    groups = [ExpertGroup(index, tuple(range(32 * index, 32 * index + 32))) for index in range(8)]
    families = expert_families(groups, 256 * [123_456_789], {group.index: DispatchCounts() for group in groups})
    started = time.process_time()
    page = exposition(labelled(families, {"model": "deepseek-v3", "replica": "m-0123abcd#coordinator#abcdefgh"}))
    seconds = time.process_time() - started
    print(f"{len(page)} bytes in {1000 * seconds:.1f} ms")
    assert page.count(b"manta_expert_rows_total{") == 256
    assert len(page) < 70_000
    assert seconds < 0.2, "of a busy machine's CPU"
