"""What tests of attention share."""

from __future__ import annotations

from dataclasses import replace

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.known_models import MIXTRAL_8X7B


def sized(*, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None = None) -> Architecture:
    """Mixtral, but with these heads."""
    return replace(
        MIXTRAL_8X7B, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=sliding_window
    )
