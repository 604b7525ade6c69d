"""The KV cache leaves room for what steps take, and a step takes no more than that."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.config import EngineConfig
from cluster.errors import DoesNotFit
from cluster.planning.placement import DeviceShare
from cluster.planning.step_memory import step_bytes
from experts_service.transformers_backend.layer_attention import LayerAttention, Sight, with_cache_of
from experts_service.transformers_backend.meta_model import checked
from router_service.attention.cache_size import CacheSize, cache_size
from router_service.scheduling.scheduler import ScheduledSequence
from tests.checkpoints import write_checkpoint
from tests.memory import peak_bytes
from tests.router_service.engines import Bench
from tests.router_service.requests import make_sequence
from tests.transformers_families import random_model, tiny_config

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


SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": CONTEXT}


@pytest.mark.parametrize("kept_in", ["auto", "int8"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_no_step_takes_more_than_is_kept_for_it(wide, kind, kept_in):
    """Sixteen sequences of full length that are sampled from in every way, or the end of a long prompt with scores."""
    bench = of_all_sequences(wide, kv_cache_dtype=kept_in)
    runner = bench.engine.model_runner
    architecture, gathers = runner.decoder.architecture, runner.attention.gathers
    kv_dtype = "int8" if kept_in == "int8" else None
    bound = step_bytes(architecture, "float32", local_experts=True, gathers=gathers, kv_dtype=kv_dtype, **SIZES)
    peak = peak_of_a_step(bench, kind)
    assert peak <= bound
    assert kind == "decode" or bound <= 5 * peak, "a bound, not any number"


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt_oss", "float32"),
        ("gpt_oss", "bfloat16"),
        ("deepseek_v32", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("deepseek_v32", "bfloat16"), ("mimo_v2_flash", "bfloat16"), ("mimo_v2_flash", "float32"))
        ),
    ],
)
def test_scores_that_are_in_memory_are_kept_room_for(tmp_path, family, dtype):
    """Sinks are among them; torch has them as well where values are not as wide as keys, and an indexer has its own.

    In bf16 torch has keys, values and scores in fp32 there: a step took 834 MiB of 479. Of MiMo-V2's, which 16 heads
    share, it makes some for each head: a step took 763 MiB of 494.
    """
    heads, kv_heads = {"gpt_oss": (32, 2), "deepseek_v32": (32, 32), "mimo_v2_flash": (64, 4)}[family]
    architecture = write_wide_family(tmp_path, family, num_attention_heads=heads, num_key_value_heads=kv_heads)
    bound = step_bytes(architecture, dtype, local_experts=True, **SIZES)
    assert architecture.has_scores
    peak = peak_of_a_step(of_all_sequences(tmp_path, dtype), "decode")
    assert peak <= bound
    assert not architecture.widened or bound <= 1.5 * peak, "a bound, not any number"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_prompt_and_decodes_come_one_after_the_other(tmp_path, dtype):
    """What both take was added up: 1,310 MiB were kept where a step took 843."""
    architecture = write_wide_family(tmp_path, "deepseek_v3", num_attention_heads=32, num_key_value_heads=32)
    bound = step_bytes(architecture, dtype, local_experts=True, **SIZES)
    peak = peak_of_a_step(of_all_sequences(tmp_path, dtype), "both")
    assert peak <= bound <= 1.5 * peak


def test_keys_that_heads_share_are_counted_for_each_where_torch_copies_them():
    sight = Sight(None, None)
    alone, shared = (
        LayerAttention(num_heads=8, num_kv_heads=heads, key_dim=24, value_dim=16, scaling=1.0, sight=sight)
        for heads in (8, 2)
    )
    assert with_cache_of(MIXTRAL_8X7B, [alone]).widened == 8 * (24 + 24)
    assert with_cache_of(MIXTRAL_8X7B, [alone, shared]).widened == 8 * (24 + 24 + 16)


@pytest.mark.long
def test_what_an_indexer_sorts_is_kept_room_for(tmp_path):
    """One head: as many pairs of rows and keys at once as there may be scores. 372 MiB were taken of 262."""
    architecture = write_wide_family(tmp_path, "deepseek_v32", index_n_heads=1)
    sizes = SIZES | {"max_num_batched_tokens": CONTEXT}
    bound = step_bytes(architecture, "bfloat16", local_experts=True, **sizes)
    assert peak_of_a_step(of_all_sequences(tmp_path, "bfloat16", sizes), "prefill", sizes) <= bound


def test_an_indexer_of_fewer_heads_sorts_more_at_once(tmp_path):
    architecture = write_wide_family(tmp_path, "deepseek_v32", index_n_heads=1)
    of_none, of_one, of_many = (
        step_bytes(replace(architecture, index_heads=heads), "bfloat16", **SIZES | {"max_num_batched_tokens": CONTEXT})
        for heads in (0, 1, 64)
    )
    assert of_none < of_many < of_one


def write_wide_family(directory, family, **keys):
    """What the checkpoint is planned by."""
    config = tiny_config(family)
    config.update(keys)
    config.max_position_embeddings, config.sliding_window, config.vocab_size = CONTEXT, CONTEXT, CONTEXT + 8
    random_model(config).save_pretrained(directory)
    return checked(open_checkpoint(directory), None).architecture


def of_all_sequences(directory, dtype="float32", sizes=SIZES, **settings):
    """An engine whose cache has room for all of them, and numbers near 0.01."""
    blocks = SIZES["max_num_seqs"] * CONTEXT // 64
    bench = Bench(directory, dtype=dtype, block_size=64, num_kv_blocks=blocks, **sizes, **settings)
    for memory in (bench.engine.model_runner.kv_cache.keys, bench.engine.model_runner.kv_cache.values):
        memory.view(torch.uint8).fill_(0x3C)  # of codes the scales as well
    return bench


def peak_of_a_step(bench, kind, sizes=SIZES):
    """What one takes, of sequences that decode or of the end of a prompt, or of all but one and of it."""
    runner, blocks = bench.engine.model_runner, bench.engine.scheduler.block_manager
    sequences, tokens = sizes["max_num_seqs"], sizes["max_num_batched_tokens"]
    if kind != "prefill":
        batch = [
            ScheduledSequence(make_sequence(range(3, CONTEXT + 2), temperature=1.0, top_p=0.9, logprobs=5), 4094, 1)
            for _ in range(sequences)
        ]
    else:
        batch = [ScheduledSequence(make_sequence(range(3, CONTEXT + 3), prompt_logprobs=1), CONTEXT - tokens, tokens)]
    if kind == "both":
        tokens -= sequences - 1
        batch = [*batch[:-1], ScheduledSequence(make_sequence(range(3, CONTEXT + 3)), CONTEXT - tokens, tokens)]
    for scheduled in batch:
        assert blocks.grow(scheduled.sequence, len(scheduled.sequence))

    def run():
        if kind == "prefill":  # its other scores are there
            batch[0].sequence.prompt_logprobs = [None] * (CONTEXT - tokens + 1)
        output = runner.forward(batch)
        bench.engine.sampler(output.logits, [scheduled.sequence for scheduled in batch])
        output.land()

    small = [ScheduledSequence(batch[0].sequence, 0, 1)]
    runner.forward(small)  # what is allocated once
    return min(peak_bytes(run) for _ in range(3))  # malloc keeps more in one run than in another
