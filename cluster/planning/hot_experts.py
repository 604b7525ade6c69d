"""Which formats and how many experts a card and a memory hold, best quality first. Plain arithmetic; reads nothing.

A card has one group, beside which a coordinator fits on any of them; all other experts are one group on the CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

QUALITY = ("none", "int8", "fp8", "int4")  # by the error of rounding, best first


@dataclass(frozen=True, slots=True)
class Split:
    """Experts of each card, and those of the CPUs, with what they are rounded to there."""

    on_gpus: tuple[tuple[int, ...], ...]  # of each card; none where no expert fits
    on_cpus: tuple[int, ...]
    gpu_format: str
    cpu_format: str


def splits(
    by_use: Sequence[int], cards: int, card_bytes: float, ram_bytes: float, held: Mapping[tuple[str, str], int]
) -> Iterator[Split]:
    """All that fit, best first. `by_use`: the experts, the most used one first.

    `card_bytes` and `ram_bytes` are left for experts on each card and in all memory; `held` has the bytes of one expert
    by device and format. A format that a device does not hold smaller is none for it.
    """
    num_experts = len(by_use)

    def formats(device: str) -> list[str]:
        plain = held[device, "none"]
        return [one for one in QUALITY if one == "none" or held.get((device, one), plain) < plain]

    found = []
    most_so_far, smallest = -1, math.inf
    for gpu_format in formats("cuda"):
        size = held["cuda", gpu_format]
        most = min(num_experts, cards * int(max(0.0, card_bytes) // size))
        if most <= most_so_far and size > 0.9 * smallest:
            continue  # of a better format there are as many, and they are read about as fast
        most_so_far, smallest = most, size
        hot, cold = by_use[:most], by_use[most:]
        # Every card has as many, and the most used ones are spread over them.
        on_gpus = tuple(tuple(sorted(hot[card::cards])) for card in range(cards) if hot[card::cards])
        for cpu_format in formats("cpu") if cold else ["none"]:
            if len(cold) * held["cpu", cpu_format] <= ram_bytes:
                found.append(Split(on_gpus, tuple(sorted(cold)), gpu_format, cpu_format))
    yield from sorted(
        found,
        key=lambda one: (
            max(QUALITY.index(one.gpu_format), QUALITY.index(one.cpu_format)),
            QUALITY.index(one.gpu_format) + QUALITY.index(one.cpu_format),
        ),
    )
