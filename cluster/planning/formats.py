"""What models of known sizes take in each format: files, memory of CPUs, cards. Plain arithmetic over their shapes.

Experts and attention's projections are quantised; embeddings, head, norms and gates are not, as quantisers leave them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.known_models import MIXTRAL_8X7B, MIXTRAL_8X22B
from cluster.checkpoint.quantization.scheme import READ, Awq, Gptq, Packed, Part, Scheme, Values
from cluster.checkpoint.safetensors_header import ITEM_BYTES
from cluster.errors import DoesNotFit
from cluster.planning.gpus import GPUS, GpuType
from cluster.planning.plan import Planner, Target
from cluster.planning.roofline import Link, Load, Model
from cluster.planning.weights import matrix_bytes, stays_as_it_is

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
CONTEXT, MOST_CARDS = 8192, 64
_PLAIN_BYTES = 2  # of a weight, and of a scale
_FREE_LINK = Link(math.inf, 0.0)  # how fast rows travel says nothing of what fits


def stored_bytes(architecture: Architecture, scheme: Scheme | None) -> int:
    """Of the files, without their headers."""
    return sum(_stored(name, shape, scheme) for name, shape in all_tensors(architecture).items())


def memory_bytes(architecture: Architecture, scheme: Scheme | None) -> int:
    """Of all processes' weights, in bf16 on CPUs."""
    return sum(_held(name, shape, scheme) for name, shape in all_tensors(architecture).items())


def fewest_cards(architecture: Architecture, gpu: GpuType) -> int | None:
    """That hold the model in bf16, which every format is widened to there, and a sequence of CONTEXT tokens."""
    planner = Planner(Model(architecture, "bfloat16"), gpu, _FREE_LINK)
    for cards in range(1, MOST_CARDS + 1):
        try:
            planner.plan(Target(Load(1, CONTEXT), gpus=cards))
        except DoesNotFit:
            continue
        return cards
    return None


def table() -> str:
    """Both of a page's tables, as Markdown."""
    lines = ["| model | format | files | memory of CPUs |", "|---|---|---|---|"]
    for name, architecture in MODELS.items():
        for of, scheme in FORMATS.items():
            sizes = (stored_bytes(architecture, scheme), memory_bytes(architecture, scheme))
            lines.append(f"| {name} | {of} | " + " | ".join(f"{size / 2**30:.1f} GiB" for size in sizes) + " |")
    lines += ["", "| model, any format | " + " | ".join(GPUS) + " |", "|---" * (len(GPUS) + 1) + "|"]
    for name, architecture in MODELS.items():
        cards = [fewest_cards(architecture, gpu) for gpu in GPUS.values()]
        lines.append(f"| {name} | " + " | ".join("–" if number is None else str(number) for number in cards) + " |")
    return "\n".join(lines) + "\n"


def _stored(name: str, shape: Shape, scheme: Scheme | None) -> int:
    if scheme is None or not _is_quantised(name):
        return math.prod(shape) * _PLAIN_BYTES
    return sum(_part_bytes(part) for part in scheme.parts(*shape) if part.needed and part.role in READ)


def _held(name: str, shape: Shape, scheme: Scheme | None) -> int:
    if scheme is None or not _is_quantised(name) or not stays_as_it_is(scheme, "bfloat16", "cpu"):
        return math.prod(shape) * _PLAIN_BYTES
    return matrix_bytes(shape, scheme, has_zero_points=isinstance(scheme, Awq))


def _is_quantised(name: str) -> bool:
    return ".experts." in name or ".self_attn." in name


def _part_bytes(part: Part) -> int:
    item = _PLAIN_BYTES if part.role == "scales" else ITEM_BYTES[part.dtypes[0]]
    return math.prod(part.shapes[0]) * item


if __name__ == "__main__":
    print(table(), end="")
