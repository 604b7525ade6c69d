"""The arithmetic of a step against numbers worked out by hand, and what must hold of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.errors import ConfigError
from cluster.planning.gpus import GPUS, gpu_memory_bytes, gpu_type
from cluster.planning.roofline import Link, Load, Model, attention_s, disaggregated_s, experts_s, replica_s, wire_s

MIXTRAL = Model(MIXTRAL_8X7B, "bfloat16")
H100 = gpu_type("h100")
LINK = Link(12.5e9, 100e-6)
ONE_EXPERT = 32 * 3 * 4096 * 14336 * 2  # layers × matrices × D × F × bytes


def test_one_token_reads_the_experts_that_it_goes_to() -> None:
    assert MIXTRAL.one_expert_bytes == ONE_EXPERT
    assert MIXTRAL.touched(1, 8) == pytest.approx(2)  # top-2 of 8
    assert experts_s(MIXTRAL, H100, 1, 8) == pytest.approx(2 * ONE_EXPERT / 3.35e12)
    assert experts_s(MIXTRAL, H100, 1, 1) == pytest.approx(ONE_EXPERT / 3.35e12), "where it goes, it is waited for"


def test_a_large_batch_reads_every_expert_once() -> None:
    assert MIXTRAL.touched(1000, 8) == pytest.approx(8)
    assert experts_s(MIXTRAL, H100, 100, 8) == pytest.approx(8 * ONE_EXPERT / 3.35e12)


def test_a_huge_batch_is_bound_by_operations() -> None:
    rows = 10_000  # × top-2 × 2 operations per parameter
    assert experts_s(MIXTRAL, H100, rows, 8) == pytest.approx(rows * 2 * 2 * (ONE_EXPERT / 2) / 989e12)


def test_attention_reads_its_weights_and_the_cache_of_its_sequences() -> None:
    weights = MIXTRAL.attention_bytes
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 8 * 4096 + 2 * 4096  # q, k, v, o; gate; norms
    assert weights == 2 * (32 * layer + 4096 + 32000 * 4096), "without the table of embeddings"
    assert attention_s(MIXTRAL, H100, Load(8, 1000)) == pytest.approx((weights + 8 * 1000 * 128 * 1024) / 3.35e12)


def test_rows_cross_the_wire_once_for_each_group_that_has_one_of_their_experts() -> None:
    assert MIXTRAL.groups_asked(1, [1] * 8) == pytest.approx(2)
    assert MIXTRAL.groups_asked(1, [8]) == pytest.approx(1)
    assert MIXTRAL.groups_asked(1, [4, 4]) == pytest.approx(2 * (1 - 6 / 28))  # C(4,2) of C(8,2) miss a half
    there_and_back = 2 * 16 * 2 * 4096 * 2 / 12.5e9  # rows × groups × D × bytes
    assert wire_s(MIXTRAL, LINK, 16, [1] * 8) == pytest.approx(32 * (there_and_back + 100e-6))


@given(
    sequences=st.integers(1, 4096),
    more=st.integers(0, 4096),
    context=st.integers(1, 32768),
    gpu=st.sampled_from(sorted(GPUS)),
    coordinators=st.integers(1, 16),
)
def test_more_sequences_never_make_a_step_shorter(
    sequences: int, more: int, context: int, gpu: str, coordinators: int
) -> None:
    arguments = MIXTRAL, GPUS[gpu], LINK
    for shared in (False, True):
        before = disaggregated_s(*arguments, Load(sequences, context), [2] * 4, coordinators, shared=shared)
        after = disaggregated_s(*arguments, Load(sequences + more, context), [2] * 4, coordinators, shared=shared)
        # Halves that take turns begin with two sequences to a coordinator, and may then be the shorter way.
        assert after >= before * (1 - 1e-9) or (not shared and sequences < 2 * coordinators)


@given(sequences=st.integers(1, 4096), context=st.integers(1, 32768), gpus=st.integers(1, 8))
def test_a_fat_replica_on_ideal_gpus_is_as_much_faster_as_there_are(sequences: int, context: int, gpus: int) -> None:
    load = Load(sequences, context)
    assert replica_s(MIXTRAL, H100, load, gpus) * gpus == pytest.approx(replica_s(MIXTRAL, H100, load, 1))
    alone = disaggregated_s(MIXTRAL, H100, Link(1e30, 0), load, [8], 1, shared=True)
    assert alone == pytest.approx(replica_s(MIXTRAL, H100, load, 1)), "one of everything, and a wire that costs nothing"


def test_a_dense_model_is_attention_alone() -> None:
    dense = Model(replace(MIXTRAL_8X7B, num_experts=0, top_k=0), "bfloat16")
    load = Load(4, 100)
    assert disaggregated_s(dense, H100, LINK, load, [], 1) == attention_s(dense, H100, load)


def test_types_of_gpus_are_found_by_name() -> None:
    assert gpu_type("a100-80g").memory_bytes == 80 * 10**9 == gpu_memory_bytes("A100-80G")
    assert gpu_memory_bytes("T4") == 16 * 10**9
    assert gpu_memory_bytes("a name of next year") > 10**15
    with pytest.raises(ConfigError, match=r"there is no GPU type 'H300'; known are .*H100"):
        gpu_type("H300")
