"""What processes say of their kernels: which of them decide bits, and whether a model's replicas have the same."""

from __future__ import annotations

from dataclasses import replace

from cluster.telemetry.kernels import ModelKernels, ProcessKernels, kernels_family

OURS = ProcessKernels(
    "bfloat16", "dot", True, "znver4", "AVX512", "pages in place", "numba", (("dot", (0.001, 0.002)),), (1, 4)
)
SHARD = replace(OURS, attention="", sampling="")


def model(*coordinators: ProcessKernels, shard: ProcessKernels = SHARD) -> ModelKernels:
    return ModelKernels({"coordinator": coordinators, "expert-0": (shard,)})


def test_more_replicas_and_what_was_measured_change_no_digest() -> None:
    measured_anew = replace(OURS, speeds=(("dot", (0.003, 0.004)),))
    one, two = model(OURS), model(measured_anew, OURS)
    assert one.digest == two.digest
    assert (one.mixed, two.mixed) == ((), ())
    assert len(two.distinct("coordinator")) == 1


def test_whatever_computes_changes_the_digest() -> None:
    known = model(OURS).digest
    for change in (
        {"matmuls": "fma"},
        {"attention": "reference"},
        {"sampling": "torch"},
        {"dtype": "float32"},
        {"vectors": "AVX2"},
    ):
        assert model(replace(OURS, **change)).digest != known, change
    assert model(OURS, shard=replace(SHARD, matmuls="fma")).digest != known
    assert model(OURS, replace(OURS, matmuls="fma")).digest != known


def test_our_kernels_are_the_same_on_other_cpus_and_a_librarys_are_not() -> None:
    other = replace(OURS, device="sapphirerapids")
    assert model(OURS, other).mixed == ()
    by_torch, elsewhere = (replace(one, matmuls="torch", batch_invariant=False) for one in (OURS, other))
    assert model(by_torch, elsewhere).mixed == ("coordinator",)


def test_what_matrices_were_rounded_to_changes_the_digest() -> None:
    rounded = replace(SHARD, weights="INT8, groups of 128")
    assert model(OURS, shard=rounded).digest != model(OURS).digest
    assert (rounded.format, SHARD.format) == ("INT8, groups of 128", "bfloat16")


def test_replicas_of_a_group_on_two_tiers_are_those_of_one_group() -> None:
    """Each deployment's were alike, so nothing told that one group answered from two tiers in two formats."""
    rounded = replace(SHARD, weights="INT8, groups of 128")
    groups = {"coordinator": (OURS,), "expert-0": (SHARD,), "expert-1": (rounded,)}
    assert ModelKernels(groups).mixed == (), "each group has a format of its own"
    alike = ModelKernels(groups | {"expert-0-tier1": (SHARD, SHARD)})
    assert (alike.mixed, alike.batch_invariant) == ((), True)
    unlike = ModelKernels(groups | {"expert-0-tier1": (rounded,)})
    assert (unlike.mixed, unlike.batch_invariant) == (("expert-0",), False)
    assert unlike.formats("expert-0") == ("INT8, groups of 128", "bfloat16")
    assert unlike.digest != alike.digest


def test_a_model_is_batch_invariant_when_every_process_is_and_has_said_so() -> None:
    assert model(OURS).batch_invariant
    assert not model(OURS, replace(OURS, batch_invariant=False)).batch_invariant
    assert not model().batch_invariant


def test_the_figure_has_them_in_labels() -> None:
    [sample] = kernels_family(OURS).samples
    assert sample.name == "manta_kernels_info"
    assert (sample.value, sample.labels["matmuls"], sample.labels["batch_invariant"]) == (1, "dot", "true")
