"""What the rows of experts cost to run, in rows. A rough measure, to share work between cores by."""

from __future__ import annotations

from collections.abc import Sequence

READ_ROWS = 8  # an expert with fewer rows takes as long as with these: its weights have to be read


def cost(counts: Sequence[int]) -> int:
    """Of running one expert for each of `counts` rows."""
    return sum(max(count, READ_ROWS) for count in counts if count)
