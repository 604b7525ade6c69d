"""What known models take in each format: the page says what the arithmetic says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.known_models import KNOWN_MODELS, MIXTRAL_8X7B
from cluster.checkpoint.outline import outline
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.scheme import Packed
from cluster.config import EngineConfig
from cluster.planning.formats import CONTEXT, FORMATS, on_gpus, stored_bytes, table
from cluster.planning.gpus import gpu_type
from cluster.planning.plan import Planner
from cluster.planning.weights import held_weights
from tests.checkpoints import write_checkpoint
from tests.programs import REPOSITORY
from tests.quantized_checkpoints import compressed_tensors, fine_grained_fp8, gptq, write_quantized

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def test_the_page_says_what_the_arithmetic_says() -> None:
    page = (REPOSITORY / "docs" / "quantization.md").read_text()
    [_, tables] = page.split("<!-- made by `python -m cluster.planning.formats` -->\n")
    assert tables.split("<!-- end -->")[0] == table()


def test_fewer_bits_take_less_and_act_order_a_little_more() -> None:
    sizes = {name: stored_bytes(MIXTRAL_8X7B, scheme) for name, scheme in FORMATS.items()}
    assert sizes["bf16"] == 2 * 46_702_792_704
    assert 0.25 * sizes["bf16"] < sizes["INT4, groups of 128"] < sizes["INT4, groups of 32"] < 0.3 * sizes["bf16"]
    assert sizes["INT4, groups of 128"] < sizes["GPTQ of 4 bits, groups of 128, act-order"] < 1.02 * sizes[
        "INT4, groups of 128"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("casperhansen/mixtral-instruct-awq", 24.65),
        ("TheBloke/Mistral-7B-Instruct-v0.1-AWQ", 4.15),
        ("TheBloke/Mistral-7B-Instruct-v0.2-GPTQ", 4.16),
        ("mistralai/Mistral-7B-Instruct-v0.3", 14.5),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 93.4),
        ("Qwen/Qwen3-30B-A3B", 61.06),
        ("Qwen/Qwen3-235B-A22B", 470.2),
        ("Qwen/Qwen1.5-MoE-A2.7B", 28.63),
        ("allenai/OLMoE-1B-7B-0924", 13.84),
        ("ibm-granite/granite-3.0-1b-a400m-instruct", 2.67),
        ("ibm-granite/granite-3.0-3b-a800m-instruct", 6.6),
        ("Qwen/Qwen3-8B", 16.38),
        ("Qwen/Qwen2.5-7B-Instruct", 15.23),
        ("meta-llama/Llama-3.1-8B", 16.06),
    ],
)
def test_models_of_the_hub_are_as_large_as_the_hub_says(model: str, gigabytes: float) -> None:
    known = KNOWN_MODELS[model]
    assert stored_bytes(known.architecture, known.scheme) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_an_outline_holds_what_the_same_checkpoint_on_disk_holds(tmp_path: Path) -> None:
    """Plans for models that are not here, and for those that are, come from the same figures."""
    for index, of in enumerate((None, gptq(4), compressed_tensors("pack-quantized", INT4), fine_grained_fp8((32, 32)))):
        directory = tmp_path / str(index)
        directory.mkdir()
        if of is None:
            write_checkpoint(directory)
        else:
            write_quantized(directory, of)
        here = open_checkpoint(directory)
        [scheme] = {ref.scheme for ref in here.tensors.values() if isinstance(ref, QuantizedRef)} or {None}
        elsewhere = outline("acme/model", here.architecture, scheme)
        assert set(elsewhere.tensors) == set(here.tensors)
        for device in "cpu", "cuda":
            planned, found = (held_weights(one, "bfloat16", device) for one in (elsewhere, here))
            if isinstance(scheme, Packed):  # here in fp32, whose scales take four bytes; who makes such models has bf16
                assert planned.expert / found.expert == (0.5 + 2 / 32) / (0.5 + 4 / 32)
            else:
                assert planned == found
        if scheme is None:
            rounding = EngineConfig(quantization="int4", quantization_group_size=32).rounding
            rounded = held_weights(elsewhere.rounded(rounding), "bfloat16", "cpu")
            assert rounded == held_weights(here.rounded(rounding), "bfloat16", "cpu")
            assert rounded.expert < held_weights(here, "bfloat16", "cpu").expert / 3


def test_a_card_more_or_less() -> None:
    model = on_gpus(MIXTRAL_8X7B, None)
    assert Planner(model, gpu_type("H200")).fewest_gpus(CONTEXT) == 1
    assert Planner(model, gpu_type("H100")).fewest_gpus(CONTEXT) == 2
