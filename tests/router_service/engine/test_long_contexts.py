"""A step of long contexts leaves nothing behind: resident memory stays what it is, however many steps are taken."""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.setup import BLOCK_SIZE
from cluster.commands.bench.make_model import write_model
from cluster.commands.bench.memory import resident_memory
from cluster.commands.bench.shapes import BENCH
from cluster.demo_model import DIRECTORY
from cluster.planning.placement import kv_bytes_per_token
from router_service.attention.backend import AttentionPlan
from tests.checkpoints import write_checkpoint
from tests.router_service.engine.long_contexts import LongContexts
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

MIB = 2**20


def test_steps_leave_nothing_behind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    sequences = LongContexts(tmp_path, Workload.after_context(4, 100, 125), num_threads=1)
    readings = sequences.resident_bytes(120, every=20)
    assert sequences.engine.stats().prompt_tokens_total <= 4 * BLOCK_SIZE  # of each, what is no whole block
    assert sequences.engine.stats().generation_tokens_total == 4 * 120
    assert max(readings[2:]) - readings[1] < 4 * MIB


@pytest.mark.long
def test_a_thousand_steps_of_64_sequences_of_8192_tokens_leave_nothing_behind(tmp_path: Path) -> None:
    """4.3 GB of keys and values, of the benchmarks' model."""
    write_model(BENCH, tmp_path / "model")
    sequences = LongContexts(tmp_path / "model", Workload.after_context(64, 8192, 1010))
    readings = sequences.resident_bytes(1001, every=50)
    assert max(readings[2:]) - readings[1] < 64 * MIB


@pytest.mark.long
@pytest.mark.parametrize("kept_in", ["auto", "int8"])
def test_a_prompt_of_30_000_tokens_takes_time_in_proportion_and_memory_for_its_keys_and_values(kept_in: str) -> None:
    """Of the demo model: attention for what is seen, the rest of a step for its tokens, memory for one step."""
    length = 30_000
    bench = Bench(DIRECTORY, num_kv_blocks=2048, max_model_len=32_768, num_threads=None, kv_cache_dtype=kept_in)
    bench.run(make_request(range(3, 103), max_tokens=2, ignore_eos=True))  # what is made once
    runner = bench.engine.model_runner
    for memory in (runner.kv_cache.keys, runner.kv_cache.values):
        memory.zero_()  # it has its memory from here on
    attention = 0.0
    plain = AttentionPlan.attend

    def timed(*arguments: Any) -> torch.Tensor:
        nonlocal attention
        started = time.process_time()
        attended = plain(*arguments)
        attention += time.process_time() - started
        return attended

    bench.add(make_request(random.Random(0).choices(range(3, 503), k=length), max_tokens=2, ignore_eos=True))
    steps: list[tuple[int, float, float]] = []  # tokens, CPU seconds of attention, and of the rest
    before = bench.engine.stats().prompt_tokens_total
    with pytest.MonkeyPatch.context() as patch, resident_memory() as resident:
        patch.setattr(AttentionPlan, "attend", timed)
        while bench.engine._sequences:
            attention, started = 0.0, time.process_time()
            bench.engine.step()
            seconds = time.process_time() - started
            tokens = bench.engine.stats().prompt_tokens_total - before - sum(step[0] for step in steps)
            steps.append((tokens, attention, seconds - attention))
    assert not bench.errors
    assert sum(tokens for tokens, *_ in steps) == length

    def between(first: int, last: int) -> tuple[float, float]:
        """Of these positions: µs of attention for a token and 1,000 that it sees, and ms of the rest of a step."""
        position, seen, spent, rest = 0, 0.0, 0.0, []
        for tokens, of_attention, others in steps:
            if first <= position < last:
                seen, spent = seen + tokens * (position + tokens / 2), spent + of_attention
                rest.append(others)
            position += tokens
        return 1e9 * spent / seen, 1e3 * median(rest)

    early, late = between(4_000, 12_000), between(22_000, 30_000)
    print(f"{len(steps)} steps; attention and the rest of a step, early {early} and late {late}")
    assert late[0] < 2 * early[0]
    assert late[1] < 2 * early[1]  # of fewer tokens, since a step of a long context is cut so that others need not wait
    weights = sum(ref.nbytes for ref in open_checkpoint(DIRECTORY).tensors.values())
    kept = kv_bytes_per_token(runner.decoder.architecture, "bfloat16") * length  # of what is in 8 bits half
    assert resident.grown is not None
    print(f"grown {resident.grown / MIB:.1f} MiB, weights {weights / MIB:.1f}, keys and values {kept / MIB:.1f}")
    assert resident.grown < 0.3 * (weights + kept)  # 6 to 8 MiB were seen, which are those of a step of 2,048 tokens
