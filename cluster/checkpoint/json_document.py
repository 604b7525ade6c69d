"""Reads one JSON file of a checkpoint, value by value. Knows no key by name; every error names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

LARGEST = 2**31 - 1
_SMALLEST = 1e-30  # products of smaller ones are 0 in fp32


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys. `where` opens the message of the CheckpointError."""
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is not a JSON object, but a {type(document).__name__}.")
    return document


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return document


class JsonDocument:
    """The values of one file, or of one object in it, taken out with their type and range checked."""

    def __init__(self, file: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.file = file
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> JsonDocument:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        return cls(file, parse_json(content, str(file)))

    def error(self, key: str, problem: str) -> CheckpointError:
        """A CheckpointError about one key, for the caller to raise."""
        return CheckpointError(f"{self.file}: {self._prefix}{key} {problem}.")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def check_keys(self, known: Collection[str], one_value: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises CheckpointError for a key that is neither `known` nor null nor has one of the values it may have."""
        for key, value in self.values.items():
            if value is None or key in known or value in one_value.get(key, ()):
                continue
            if key in one_value:
                expected = json.dumps(one_value[key][0])
                raise self.error(key, f"is {shortened(value)}, which Manta does not support; expected {expected}")
            raise self.error(
                key,
                "is not known to Manta and may change what the model says; where it does not, take it out of the file",
            )

    def section(self, key: str) -> JsonDocument:
        """A nested object; an absent one is empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; expected an object")
        return JsonDocument(self.file, value or {}, f"{self._prefix}{key}.")

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, f"is {shortened(value)}; expected an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0, maximum: float = 1e12) -> float:
        """A number above `minimum` and up to `maximum`."""
        value = self._value(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not max(minimum, _SMALLEST) < value <= maximum
        ):
            raise self.error(key, f"is {shortened(value)}; expected a number above {minimum:g} and up to {maximum:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {shortened(value)}; expected true or false")
        return value

    def integers(self, key: str, maximum: int) -> tuple[int, ...]:
        """An integer or a list of them, from 0; null or absent: none."""
        value = self.values.get(key)
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= maximum:
                raise self.error(key, f"holds {shortened(number)}; expected integers from 0 to {maximum}")
        return tuple(numbers)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, "is missing")
        return default if value is None else value


def names(*lines: str) -> frozenset[str]:
    """The words of the lines."""
    return frozenset(" ".join(lines).split())


def shortened(value: Any) -> str:
    """For a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
