"""Which experts share a process, and whether the whole fits the machines. Plain arithmetic; no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts that live in one process, the same in every layer. A replica is one live copy of a group."""

    index: int
    experts: tuple[int, ...]
