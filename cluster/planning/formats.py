"""What models of known sizes take in each format: files, memory of CPUs, cards. Plain arithmetic over their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.known_models import MIXTRAL_8X7B, MIXTRAL_8X22B
from cluster.checkpoint.outline import outline
from cluster.checkpoint.quantization.scheme import Awq, Gptq, Packed, Scheme, Values
from cluster.planning.gpus import GPUS
from cluster.planning.plan import Planner
from cluster.planning.roofline import Model
from cluster.planning.weights import held_weights

FORMATS: Mapping[str, Scheme | None] = {
    "bf16": None,
    "FP8, a scale for each output": Values(8, is_float=True, block=(1, None)),
    "INT8, a scale for each output": Packed(8, (1, None), zero_points=False, act_order=False),
    "INT4, groups of 128": Packed(4, (1, 128), zero_points=False, act_order=False),
    "INT4, groups of 32": Packed(4, (1, 32), zero_points=False, act_order=False),
    "GPTQ of 4 bits, groups of 128, act-order": Gptq(4, 128, act_order=True, symmetric=True, stored_less_one=True),
    "AWQ, groups of 128": Awq(128),
}
MODELS: Mapping[str, Architecture] = {"Mixtral 8x7B": MIXTRAL_8X7B, "Mixtral 8x22B": MIXTRAL_8X22B}
CONTEXT = 8192


def stored_bytes(architecture: Architecture, scheme: Scheme | None) -> int:
    """Of the files, without their headers."""
    return sum(ref.nbytes for ref in outline("", architecture, scheme).tensors.values())


def memory_bytes(architecture: Architecture, scheme: Scheme | None) -> int:
    """Of all processes' weights, in bf16 on CPUs."""
    weights = held_weights(outline("", architecture, scheme), "bfloat16", "cpu")
    return weights.coordinator + architecture.num_experts * weights.expert


def on_gpus(architecture: Architecture, scheme: Scheme | None) -> Model:
    """As GPUs hold that format in bf16."""
    return Model(architecture, "bfloat16", held_weights(outline("", architecture, scheme), "bfloat16", "cuda"))


def table() -> str:
    """Both of a page's tables, as Markdown."""
    lines = ["| model | format | files | memory of CPUs |", "|---|---|---|---|"]
    for name, architecture in MODELS.items():
        for of, scheme in FORMATS.items():
            sizes = (stored_bytes(architecture, scheme), memory_bytes(architecture, scheme))
            lines.append(f"| {name} | {of} | " + " | ".join(f"{size / 2**30:.1f} GiB" for size in sizes) + " |")
    lines += ["", "| model | format | " + " | ".join(GPUS) + " |", "|---" * (len(GPUS) + 2) + "|"]
    for name, architecture in MODELS.items():
        formats: dict[tuple[int | None, ...], list[str]] = {}
        for of, scheme in FORMATS.items():
            model = on_gpus(architecture, scheme)
            fewest = tuple(Planner(model, gpu).fewest_gpus(CONTEXT) for gpu in GPUS.values())
            formats.setdefault(fewest, []).append(of)
        for cards, alike in formats.items():
            of = "any" if len(formats) == 1 else "; ".join(alike)
            numbers = " | ".join("–" if number is None else str(number) for number in cards)
            lines.append(f"| {name} | {of} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
