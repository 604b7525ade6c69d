"""The machine that `manta plan --ram` plans for: cards, memory, cores. What nobody said is listed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cluster.errors import ConfigError
from cluster.planning.costs import CORE_FLOPS, CPU_BANDWIDTH, CPU_CORES, Figure
from cluster.planning.gpus import GPUS, GpuType
from cluster.planning.placement import Node
from cluster.planning.plan import USABLE
from cluster.planning.tiers import Cpus

RAM_USABLE = 0.9  # the rest is the system's, Ray's and the gateway's
NO_CARD = GpuType("no card", 0, 1.0, 1.0)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([GT])(i?)B?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Cards, and the memory beside them."""

    card: GpuType
    cards: int
    ram_bytes: int | None  # None: nobody said
    cpus: Cpus
    card_like: Figure | None = None  # where nobody said how fast it is
    of_cpus: tuple[Figure, ...] = ()  # that nobody said

    @property
    def node(self) -> Node:
        """What processes are given of it."""
        memory = 2**62 if self.ram_bytes is None else int(RAM_USABLE * self.ram_bytes)
        return Node("the machine", memory, (int(USABLE * self.card.memory_bytes),) * self.cards)

    def assumed(self, *, on_cpus: bool) -> tuple[Figure, ...]:
        """What nobody said; of CPUs where there are experts `on_cpus`."""
        return (() if self.card_like is None else (self.card_like,)) + (self.of_cpus if on_cpus else ())


def parse_memory(text: str, option: str) -> int:
    """`24GB`, `24GiB`, `24` (GB) as bytes. Raises ConfigError."""
    match = _MEMORY.fullmatch(text.strip())
    size = 0.0
    if match:
        unit = (match[2] or "G").upper()
        power = {"G": 3, "T": 4}[unit]
        size = float(match[1]) * (2 ** (10 * power) if match[3] else 10 ** (3 * power))
    if not size >= 1e8:
        raise ConfigError(f"{option}: {text!r} is no size of memory; expected something like 24GB or 64GiB")
    return int(size)


def machine_of(
    card: GpuType | None,
    gpu_memory: str | None,
    ram: str | None,
    *,
    cards: int,
    ram_bandwidth: float | None,
    measured: Figure | None = None,
    cores: int | None,
) -> Machine:
    """From what the command was told; `measured`: the memory's bandwidth, of a profile. Raises ConfigError."""
    card_like = None
    if not cards:
        if card is not None or gpu_memory is not None:
            raise ConfigError("--gpus 0 is a machine without a card: leave --gpu and --gpu-memory out")
        card = NO_CARD
    elif gpu_memory is not None:
        size = parse_memory(gpu_memory, "--gpu-memory")
        if card is None:
            like = min(
                (one for one in GPUS.values() if one.memory_bytes >= size),
                key=lambda one: one.bandwidth,
                default=min(GPUS.values(), key=lambda one: -one.memory_bytes),
            )
            card = replace(like, name="card")
            card_like = Figure(like.bandwidth, f"the card is as fast as an {like.name}", False, "give --gpu as well")
        card = replace(card, memory_bytes=size)
    if card is None:
        raise ConfigError(
            "--ram: which card is beside it? Give --gpu-memory (24GB), --gpu (L4), or both; --gpus 0: there is none"
        )
    said = ((ram_bandwidth, measured or CPU_BANDWIDTH), (cores, CPU_CORES))
    cpus = Cpus(ram_bandwidth or (measured or CPU_BANDWIDTH).value, (cores or int(CPU_CORES.value)) * CORE_FLOPS.value)
    of_cpus = tuple(figure for given, figure in said if given is None)
    return Machine(card, cards, None if ram is None else parse_memory(ram, "--ram"), cpus, card_like, of_cpus)
