"""The list of models as Anthropic's clients read it, page by page. Knows names and dates; asks nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cluster.errors import InvalidRequest
from cluster.messages import ModelCard

Json = dict[str, Any]
MAX_LIMIT, DEFAULT_LIMIT = 1000, 20


def model_entry(card: ModelCard, name: str) -> Json:
    """One model under one of its names."""
    created = datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created}


def models_page(entries: Sequence[Json], query: Mapping[str, str]) -> Json:
    """As `limit`, `after_id` and `before_id` of a query ask. Raises InvalidRequest."""
    limit = _limit(query.get("limit"))
    names = [entry["id"] for entry in entries]
    start, end = 0, len(entries)
    if (after := query.get("after_id")) is not None:
        start = _place(names, after, "after_id") + 1
    if (before := query.get("before_id")) is not None:
        end = _place(names, before, "before_id")
        page = list(entries[max(start, end - limit) : end])
        has_more = end - limit > start
    else:
        page = list(entries[start : start + limit])
        has_more = start + limit < end
    return {
        "data": page,
        "has_more": has_more,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"limit: expected 1 to {MAX_LIMIT}", param="limit")
    return int(text)


def _place(names: Sequence[str], name: str, field: str) -> int:
    if name not in names:
        raise InvalidRequest(f"{field}: no model of that name is in the list", param=field)
    return names.index(name)
