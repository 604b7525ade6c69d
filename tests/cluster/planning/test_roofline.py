"""The arithmetic of a step against numbers worked out by hand, and what must hold of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint.known_models import MISTRAL_7B, MIXTRAL_8X7B
from cluster.errors import ConfigError
from cluster.planning.gpus import GPUS, gpu_memory_bytes, gpu_type
from cluster.planning.roofline import (
    Link,
    Load,
    Model,
    attention_s,
    cache_bytes,
    chunk_attention_s,
    disaggregated_s,
    experts_s,
    local_s,
    prefill_s,
    wire_s,
)

MIXTRAL = Model.plain(MIXTRAL_8X7B, "bfloat16")
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
def test_a_model_on_ideal_gpus_is_as_much_faster_as_there_are(sequences: int, context: int, gpus: int) -> None:
    load = Load(sequences, context)
    assert local_s(MIXTRAL, H100, load, gpus=gpus) * gpus == pytest.approx(local_s(MIXTRAL, H100, load))
    alone = disaggregated_s(MIXTRAL, H100, Link(1e30, 0), load, [8], 1, shared=True)
    assert alone == pytest.approx(local_s(MIXTRAL, H100, load)), "one of everything, and a wire that costs nothing"


def test_python_and_launches_are_added_once_to_a_step_and_once_to_each_half() -> None:
    load, host_s = Load(64, 1024), 0.01
    arguments = MIXTRAL, H100, LINK, load, [1] * 8, 1
    whole = disaggregated_s(*arguments, shared=True, host_s=host_s)
    assert whole == pytest.approx(disaggregated_s(*arguments, shared=True) + host_s)
    assert disaggregated_s(*arguments, host_s=1.0) == pytest.approx(disaggregated_s(*arguments, shared=True) + 1.0), (
        "halves would take it twice"
    )
    computed = local_s(MIXTRAL, H100, load)
    assert [local_s(MIXTRAL, H100, load, times * computed) for times in (0.5, 2.0)] == [computed, 2 * computed], (
        "of a step that waits for nothing they are done meanwhile"
    )


def test_small_numbers_are_fewer_bytes_and_as_many_operations() -> None:
    weights = replace(MIXTRAL.weights, expert=ONE_EXPERT // 4)
    small = replace(MIXTRAL, weights=weights)
    assert experts_s(small, H100, 100, 8) == pytest.approx(experts_s(MIXTRAL, H100, 100, 8) / 4)
    assert experts_s(small, H100, 10_000, 8) == pytest.approx(experts_s(MIXTRAL, H100, 10_000, 8))


def test_a_prompt_is_computed_in_chunks_and_its_rows_cross_the_wire() -> None:
    """Of a long one operations count, 2 for each parameter that a token meets; of each chunk, Python and the wire."""
    fast = Link(1e30, 0)
    met = MIXTRAL.attention_parameters + 2 * MIXTRAL.one_expert_parameters
    scores = 4 * 32 * 32 * 128 * (4096 / 2)
    computed = 4096 * (2 * met + scores) / H100.flops
    assert prefill_s(MIXTRAL, H100, None, 4096, [8]) == pytest.approx(computed, rel=1e-3)
    assert prefill_s(MIXTRAL, H100, fast, 4096, [8], 0.5) == pytest.approx(computed + 2 * 0.5, rel=1e-3)
    wire = 2 * wire_s(MIXTRAL, LINK, 2048, [8])
    assert prefill_s(MIXTRAL, H100, LINK, 4096, [8]) == pytest.approx(computed + wire, rel=1e-3)
    one = prefill_s(MIXTRAL, H100, None, 1, [8])
    assert one == pytest.approx(local_s(MIXTRAL, H100, Load(1, 1)), rel=1e-3), "a prompt of one token is a step"


def test_a_dense_model_is_attention_alone() -> None:
    dense = Model.plain(MISTRAL_7B, "bfloat16")
    load = Load(4, 100)
    assert disaggregated_s(dense, H100, LINK, load, [], 1) == attention_s(dense, H100, load)


def test_what_is_out_of_the_window_is_neither_read_nor_kept() -> None:
    """Mistral 7B v0.1 was planned for as if each token saw all 32,768 before it: eight times the bytes it reads."""
    windowed, whole = (Model.plain(one, "bfloat16") for one in (MISTRAL_7B, replace(MISTRAL_7B, sliding_window=None)))
    assert attention_s(windowed, H100, Load(8, 32768)) == attention_s(whole, H100, Load(8, 4096))
    assert attention_s(windowed, H100, Load(8, 1000)) == attention_s(whole, H100, Load(8, 1000))
    late, early = (chunk_attention_s(windowed, H100, start, 2048) for start in (30720, 4096))
    assert late == early < chunk_attention_s(whole, H100, 30720, 2048)
    of_token = 32 * 2 * 8 * 128 * 2
    assert cache_bytes(windowed, Load(8, 32768)) == 8 * (4096 + 2048) * of_token
    assert cache_bytes(windowed, Load(1, 32768)) == 32768 * of_token, "one sequence always fits"
    assert cache_bytes(whole, Load(8, 32768)) == 8 * 32768 * of_token


def test_a_coordinator_keeps_whole_sequences() -> None:
    """Of three on two coordinators each was said to need a cache for one and a half."""
    assert cache_bytes(MIXTRAL, Load(3, 1000), 2) == cache_bytes(MIXTRAL, Load(2, 1000))


def test_types_of_gpus_are_found_by_name() -> None:
    assert gpu_type("a100-80g").memory_bytes == 80 * 10**9 == gpu_memory_bytes("A100-80G")
    assert gpu_memory_bytes("T4") == 16 * 10**9
    assert gpu_memory_bytes("a name of next year") > 10**15
    with pytest.raises(ConfigError, match=r"there is no GPU type 'H300'; known are .*H100"):
        gpu_type("H300")
