"""Kubernetes' quantities, `500m` or `1.5Gi`: what is one, and how much it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from cluster.kubernetes.check.documents import Document

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(m|k|[MGTPE]|[KMGTPE]i|[eE][+-]?\d{1,2})?")
_FACTORS = {"m": Decimal("0.001"), "k": Decimal(10**3)} | {
    unit: Decimal(10 ** (3 * power)) for power, unit in enumerate("MGTPE", start=2)
}
_FACTORS |= {f"{unit}i": Decimal(2 ** (10 * power)) for power, unit in enumerate("KMGTPE", start=1)}


def parse_quantity(text: object) -> Decimal | None:
    """How much it is; None where it is no quantity."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        return None
    number, unit = match.groups()
    if unit is None:
        return Decimal(number)
    return Decimal(number) * (_FACTORS[unit] if unit in _FACTORS else Decimal(f"1{unit}"))


def quantity_problems(document: Document) -> Iterator[str]:
    """Requests, limits and sizes that are no quantities, and requests above their limits."""
    for field, node in _mappings(document.body, ""):
        sizes = {name: node.get(name) or {} for name in ("requests", "limits") if isinstance(node.get(name), dict)}
        for name, values in sizes.items():
            for resource, text in values.items():
                if parse_quantity(text) is None:
                    yield f"{document}: {field}{name}.{resource}: {text!r} is no quantity such as 500m or 2Gi"
        for resource, text in sizes.get("requests", {}).items():
            asked, most = parse_quantity(text), parse_quantity(sizes.get("limits", {}).get(resource))
            if asked is not None and most is not None and asked > most:
                yield f"{document}: {field}requests.{resource}: {text} is more than the limit"
        if "sizeLimit" in node and parse_quantity(node["sizeLimit"]) is None:
            yield f"{document}: {field}sizeLimit: {node['sizeLimit']!r} is no quantity such as 500m or 2Gi"


def _mappings(node: Any, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a document, with its path and a dot."""
    if isinstance(node, dict):
        yield field, node
        for key, value in node.items():
            yield from _mappings(value, f"{field}{key}.")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _mappings(value, f"{field.removesuffix('.')}[{index}].")
