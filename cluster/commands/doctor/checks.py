"""What a check is, and how one is run. Knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from cluster.errors import MantaError

UNEXPECTED = "it is not clear why: please report it, with what `manta doctor --json` prints"


class Status(StrEnum):
    """How a check ended."""

    GOOD = "good"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"

    @property
    def mark(self) -> str:
        """For a person."""
        return {Status.GOOD: "✓", Status.FAILED: "✗", Status.NOT_APPLICABLE: "–"}[self]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    status: Status
    found: str  # a line; of one that is not applicable, why
    advice: str = ""  # what to do, where it failed


def good(found: str) -> Finding:
    """All is well."""
    return Finding(Status.GOOD, found)


def failed(found: str, advice: str) -> Finding:
    """It is not, and this is what to do."""
    return Finding(Status.FAILED, found, advice)


def not_applicable(reason: str) -> Finding:
    """There is nothing to look at here."""
    return Finding(Status.NOT_APPLICABLE, reason)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at."""

    name: str
    meaning: str  # a sentence: what depends on it
    look: Callable[[], Finding]  # whatever it raises is a failure as well


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was run."""

    name: str
    meaning: str
    status: Status
    found: str
    advice: str

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def run_check(check: Check) -> Result:
    """What it finds; an exception is a failure with its message."""
    try:
        finding = check.look()
    except MantaError as error:
        finding = failed(" ".join(str(error).split()), "mend what it names")
    except Exception as error:
        finding = failed(told(error), UNEXPECTED)
    return Result(check.name, check.meaning, finding.status, finding.found, finding.advice)


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
