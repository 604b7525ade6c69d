"""What known models take in each format: the page says what the arithmetic says."""

from __future__ import annotations

from pathlib import Path

from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.planning.formats import FORMATS, fewest_cards, stored_bytes, table
from cluster.planning.gpus import gpu_type


def test_the_page_says_what_the_arithmetic_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "quantization.md").read_text()
    [_, tables] = page.split("<!-- made by `python -m cluster.planning.formats` -->\n")
    assert tables.split("<!-- end -->")[0] == table()


def test_fewer_bits_take_less_and_act_order_a_little_more() -> None:
    sizes = {name: stored_bytes(MIXTRAL_8X7B, scheme) for name, scheme in FORMATS.items()}
    assert sizes["bf16"] == 2 * 46_702_792_704
    assert 0.25 * sizes["bf16"] < sizes["INT4, groups of 128"] < sizes["INT4, groups of 32"] < 0.3 * sizes["bf16"]
    assert sizes["INT4, groups of 128"] < sizes["GPTQ of 4 bits, groups of 128, act-order"] < 1.02 * sizes[
        "INT4, groups of 128"
    ]  # fmt: skip


def test_a_card_more_or_less() -> None:
    assert fewest_cards(MIXTRAL_8X7B, gpu_type("H200")) == 1
    assert fewest_cards(MIXTRAL_8X7B, gpu_type("H100")) == 2
