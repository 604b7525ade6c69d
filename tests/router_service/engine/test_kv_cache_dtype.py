"""Keys and values in 8 bits: a sequence's tokens hang on nothing else, and the process says how they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import EngineConfig
from cluster.demo_model.training.corpus import entries
from cluster.errors import ConfigError
from cluster.telemetry.kernels import ModelKernels
from experts_service.kernels.compiled import jit
from experts_service.kernels.kernel import Kernel, available
from router_service.assembly import process_kernels, select_kernel
from tests.checkpoints import random_mixtral
from tests.router_service.checkpoints.test_rounded_demo_model import wrong
from tests.router_service.engine.test_batch_invariance import SIZES, Logits, assert_equal, logits_of, requests
from tests.router_service.engines import CUTS, Bench, cut_by
from tests.router_service.requests import make_request

needs_numba = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")
IN_8_BITS = {"kv_cache_dtype": "int8", "prefix_caching": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), torch.bfloat16)


def written(directory: Path, dtype: torch.dtype) -> Path:
    model = random_mixtral(num_local_experts=8, **SIZES).to(dtype)
    model.save_pretrained(directory, save_original_format=True)
    return directory


@pytest.fixture(scope="module", params=[kernel for kernel in Kernel if kernel.is_own])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip("this CPU cannot")
    return str(request.param)


@pytest.fixture(scope="module")
def alone(directory: Path, kernel: str) -> Logits:
    bench = Bench(directory, **{**IN_8_BITS, "kernels": kernel})
    return [logits_of(bench, [request])[0] for request in requests()]


@needs_numba
@cut_by("together", "chunked-prefill", "preempted", "prefix-caching")
def test_logits_have_the_same_bits_however_the_work_is_cut(
    directory: Path, kernel: str, alone: Logits, config: dict[str, Any]
) -> None:
    """What a chunk computed is read as codes by the next one, so its own tokens are read as codes as well."""
    bench = Bench(directory, **{**IN_8_BITS, "kernels": kernel, **config})
    assert_equal(logits_of(bench, requests()), alone)
    if config is CUTS["preempted"]:
        assert bench.engine.stats().preemptions_total > 0, "the test is meant to preempt"


@needs_numba
def test_the_cache_is_kept_so(directory: Path, alone: Logits) -> None:
    narrow, wide = Bench(directory, **IN_8_BITS), Bench(directory, prefix_caching=False)
    bytes_of = [bench.engine.model_runner.kv_cache.keys.nbytes for bench in (narrow, wide)]
    assert bytes_of[0] / bytes_of[1] == (SIZES["head_dim"] + 4) / (2 * SIZES["head_dim"])
    assert any(
        not torch.equal(one[position], other[position])
        for one, other in zip([logits_of(wide, [request])[0] for request in requests()[:2]], alone, strict=False)
        for position in one.keys() & other.keys()
    ), "nothing is rounded"


@pytest.mark.parametrize(
    ("dtype", "block_size"),
    [
        (torch.float32, 16),
        (torch.float32, 1),  # by copies and SDPA, which in bf16 do not promise it
        pytest.param(torch.bfloat16, 16, marks=needs_numba),
    ],
)
@pytest.mark.parametrize("cut", [1, 13])
def test_a_sequence_whose_coordinator_died_goes_on_with_the_same_tokens(
    tmp_path: Path, dtype: torch.dtype, block_size: int, cut: int
) -> None:
    """Its prompt and answer so far are computed anew by another one."""
    directory = written(tmp_path, dtype)
    config = {"block_size": block_size, "num_kv_blocks": 1024 // block_size, **IN_8_BITS}
    prompt = list(range(3, 60))
    whole = make_request(prompt, max_tokens=20, seed=5, temperature=0.7, ignore_eos=True)
    [expected] = Bench(directory, **config).run(whole)
    resumed = make_request(prompt, output=expected[:cut], max_tokens=20, seed=5, temperature=0.7, ignore_eos=True)
    assert Bench(directory, **config).run(resumed) == [expected[cut:]]


def test_answers_say_how_keys_and_values_are_kept(directory: Path) -> None:
    """So the fingerprint of what answers is another one."""
    told = []
    for kept_in in ("auto", "int8"):
        bench = Bench(directory, kv_cache_dtype=kept_in)
        decoder = bench.engine.model_runner.decoder
        selection = select_kernel(EngineConfig(), decoder.dtype, decoder.device)
        told.append(process_kernels(bench.engine, selection))
    plain, narrow = told
    assert narrow.attention == plain.attention + ", keys and values in 8 bits"
    digests = {ModelKernels({"coordinator": (one,)}).digest for one in told}
    assert len(digests) == 2


def test_a_gpu_is_refused_by_the_engine_as_well(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the configuration leaves the device to the process."""
    monkeypatch.setattr("router_service.assembly.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("router_service.assembly.read_tensors", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_dtype: int8 is for CPUs"):
        Bench(directory, kv_cache_dtype="int8")


@needs_numba
def test_a_few_questions_are_answered_word_for_word() -> None:
    assert wrong([*entries()[::150]], kv_cache_dtype="int8") == []


@needs_numba
@pytest.mark.long
def test_all_questions_are_answered_word_for_word() -> None:
    assert wrong(list(entries()), kv_cache_dtype="int8") == []
