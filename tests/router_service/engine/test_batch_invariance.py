"""In bf16 a sequence's logits have the same bits whatever else runs, however its prompt is cut, on whatever threads.

Greedy answers of a demo server changed with what ran beside them: of 8 streams 2 were the same together and alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.messages import Request
from experts_service.kernels.compiled import jit
from experts_service.kernels.kernel import Kernel, available
from router_service.scheduling.scheduler import Batch
from tests.checkpoints import random_mistral, random_mixtral
from tests.router_service.engines import CUTS, Bench, cut_by
from tests.router_service.requests import make_request

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")

SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": 300}
OWN = [kernel for kernel in Kernel if kernel.is_own]
Logits = list[dict[int, torch.Tensor]]  # of each request, by position


@pytest.fixture(scope="module", params=["experts", "dense"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp(request.param)
    model = random_mistral(**SIZES) if request.param == "dense" else random_mixtral(num_local_experts=8, **SIZES)
    model.bfloat16().save_pretrained(made, save_original_format=True)
    return made


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (3 + 5 * i,), generator=generator).tolist() for i in range(16)]
    return [make_request(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]


@pytest.fixture(scope="module", params=OWN)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each of ours that this CPU can run."""
    if request.param not in available():
        pytest.skip("this CPU cannot")
    return str(request.param)


def logits_of(bench: Bench, asked: Sequence[Request]) -> Logits:
    """Those that each request's tokens were drawn from; those of a position that was computed twice are the same."""
    seen: dict[Any, dict[int, torch.Tensor]] = defaultdict(dict)
    runner = bench.engine.model_runner
    forward = runner.forward

    def watched(batch: Batch) -> Any:
        output = forward(batch)
        for scheduled, logits in zip([one for one in batch if one.samples], output.logits, strict=True):
            of_sequence = seen[scheduled.sequence.request.key]
            position = scheduled.start + scheduled.num_tokens
            assert torch.equal(of_sequence.setdefault(position, logits.clone()), logits)
        return output

    runner.forward = watched  # type: ignore[method-assign]
    bench.run(*asked)
    assert not bench.errors
    return [seen[request.key] for request in asked]


def assert_equal(ours: Logits, expected: Logits) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.keys() == other.keys()
        for position, logits in one.items():
            assert torch.equal(logits, other[position])


@pytest.fixture(scope="module")
def alone(directory: Path, kernel: str) -> Logits:
    bench = Bench(directory, prefix_caching=False, kernels=kernel)
    return [logits_of(bench, [request])[0] for request in requests()]


@cut_by("together", "chunked-prefill", "preempted", "prefix-caching", "three-microbatches", "four-groups")
def test_logits_have_the_same_bits_however_the_work_is_cut(
    directory: Path, kernel: str, alone: Logits, config: dict[str, Any]
) -> None:
    if "num_groups" in config and "dense" in directory.name:
        pytest.skip("it has no experts")
    bench = Bench(directory, **{"prefix_caching": False, "kernels": kernel, **config})
    assert_equal(logits_of(bench, requests()), alone)
    if config is CUTS["preempted"]:
        assert bench.engine.stats().preemptions_total > 0, "the test is meant to preempt"


def test_on_any_number_of_threads(directory: Path, kernel: str) -> None:
    before = torch.get_num_threads()
    try:
        answers = [
            logits_of(Bench(directory, num_threads=number, kernels=kernel), requests()[:4]) for number in (1, 2, 3)
        ]
    finally:
        torch.set_num_threads(before)
    assert_equal(answers[1], answers[0])
    assert_equal(answers[2], answers[0])
