"""The KV cache leaves room for what steps take, and a step takes no more than that."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.config import EngineConfig
from cluster.errors import DoesNotFit
from cluster.planning.placement import DeviceShare
from cluster.planning.step_memory import step_bytes
from router_service.attention.cache_size import CacheSize, cache_size
from router_service.scheduling.scheduler import ScheduledSequence
from tests.checkpoints import write_checkpoint
from tests.memory import peak_bytes
from tests.router_service.engines import Bench
from tests.router_service.requests import make_sequence

CPU = torch.device("cpu")
GIB = 2**30


def sized(
    monkeypatch, available, *shares, architecture: Architecture = MIXTRAL_8X7B, kv_dtype="bfloat16", **config
) -> CacheSize:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    settings = EngineConfig(**config)
    return cache_size(
        architecture,
        settings,
        "bfloat16",
        CPU,
        shares or (DeviceShare(),),
        max_model_len=4096,
        local_experts=False,
        gathers=True,
        kv_dtype=kv_dtype,
    )


def test_a_cache_leaves_what_steps_take(monkeypatch):
    """It took all that it was given, and the first long step had nothing left to gather keys and values into."""
    size = sized(monkeypatch, 40 * GIB)
    assert size.step_bytes > GIB // 2
    assert size.num_blocks * size.block_bytes + size.step_bytes <= 40 * GIB // 5
    assert (size.num_blocks + 1) * size.block_bytes + size.step_bytes > 40 * GIB // 5


def test_coordinators_on_one_device_share_it(monkeypatch):
    alone, of_two = sized(monkeypatch, 60 * GIB), sized(monkeypatch, 60 * GIB, DeviceShare(2))
    both = 2 * (of_two.num_blocks * of_two.block_bytes + of_two.step_bytes)
    assert both <= 60 * GIB // 5
    assert of_two.num_blocks < alone.num_blocks / 2
    worst = sized(monkeypatch, 60 * GIB, DeviceShare(), DeviceShare(2))
    assert worst == of_two, "the worst of what may come about"


class Card:
    """A GPU of 80 GiB, of which this process has 3 for its weights and others something at the moment."""

    total_memory = 80 * GIB


@pytest.mark.parametrize(
    ("share", "room_gib"),
    [(DeviceShare(), 72 - 3), (DeviceShare(1, 20 * GIB), 72 - 20 - 3), (DeviceShare(2, 20 * GIB), 26 - 3)],
)
def test_of_a_card_it_counts_on_what_there_is_and_what_others_are_planned_to_use(monkeypatch, share, room_gib):
    """Two that started at once each saw the same memory free, and took nine tenths of it."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: Card)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 3 * GIB)
    size = cache_size(
        MIXTRAL_8X7B,
        EngineConfig(max_num_seqs=4096),
        "bfloat16",
        torch.device("cuda"),
        (share,),
        max_model_len=4096,
        local_experts=False,
        gathers=True,
    )
    used = size.num_blocks * size.block_bytes + size.step_bytes
    assert room_gib * GIB - size.block_bytes < used <= room_gib * GIB


def test_what_is_configured_is_taken(monkeypatch):
    assert sized(monkeypatch, GIB, num_kv_blocks=300).num_blocks == 300
    assert sized(monkeypatch, GIB, kv_cache_gib=1.0).num_blocks == GIB // (16 * 128 * 1024)


def test_8_bits_hold_nearly_twice_the_tokens(monkeypatch):
    wide, narrow = (sized(monkeypatch, GIB, kv_cache_gib=1.0, kv_dtype=dtype) for dtype in ("bfloat16", "int8"))
    assert narrow.num_blocks / wide.num_blocks == pytest.approx(256 / 132, rel=1e-3)
    assert narrow.num_blocks * narrow.block_bytes <= GIB


def test_too_little_for_one_sequence_says_where_the_memory_goes(monkeypatch):
    with pytest.raises(DoesNotFit, match=r"of 2.00 GiB beside the weights a step may take 1\.\d\d GiB"):
        sized(monkeypatch, 10 * GIB)


def test_one_line_says_what_fits(tmp_path, caplog):
    write_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, logger="router_service"):
        Bench(tmp_path, num_kv_blocks=64, block_size=16, max_num_seqs=8, max_model_len=512)
    [line] = [record.getMessage() for record in caplog.records if "KV cache" in record.getMessage()]
    assert "1024 tokens: 8 sequences (max_num_seqs) of 128 tokens each, or 2 of 512 (max_model_len)" in line
    assert re.search(r"a step takes up to 0\.\d\d GiB beside it", line)


CONTEXT = 4096


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose steps take megabytes."""
    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(
        directory,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16000,
        max_position_embeddings=CONTEXT,
    )
    return directory


@pytest.mark.parametrize("kept_in", ["auto", "int8"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_no_step_takes_more_than_is_kept_for_it(wide, kind, kept_in):
    """Sixteen sequences of full length that are sampled from in every way, or the end of a long prompt with scores."""
    context, sequences, tokens = CONTEXT, 16, 1024
    sizes = {"max_num_seqs": sequences, "max_num_batched_tokens": tokens, "max_model_len": context}
    blocks_of_all = sequences * context // 64
    bench = Bench(wide, dtype="float32", kv_cache_dtype=kept_in, block_size=64, num_kv_blocks=blocks_of_all, **sizes)
    runner, blocks = bench.engine.model_runner, bench.engine.scheduler.block_manager
    for memory in (runner.kv_cache.keys, runner.kv_cache.values):
        memory.view(torch.uint8).fill_(0x3C)  # numbers near 0.01, of codes the scales as well
    architecture, gathers = runner.decoder.architecture, runner.attention.gathers
    kv_dtype = "int8" if kept_in == "int8" else None
    bound = step_bytes(architecture, "float32", local_experts=True, gathers=gathers, kv_dtype=kv_dtype, **sizes)
    if kind == "decode":
        batch = [
            ScheduledSequence(make_sequence(range(3, context + 2), temperature=1.0, top_p=0.9, logprobs=5), 4094, 1)
            for _ in range(sequences)
        ]
    else:
        batch = [ScheduledSequence(make_sequence(range(3, context + 3), prompt_logprobs=1), context - tokens, tokens)]
    for scheduled in batch:
        assert blocks.grow(scheduled.sequence, len(scheduled.sequence))

    def run():
        if kind == "prefill":  # its other scores are there
            batch[0].sequence.prompt_logprobs = [None] * (context - tokens + 1)
        output = runner.forward(batch)
        bench.engine.sampler(output.logits, [scheduled.sequence for scheduled in batch])
        output.land()

    small = [ScheduledSequence(batch[0].sequence, 0, 1)]
    runner.forward(small)  # what is allocated once
    peak = min(peak_bytes(run) for _ in range(3))  # malloc keeps more in one run than in another
    assert peak <= bound
    assert kind == "decode" or bound <= 5 * peak, "a bound, not any number"
