"""What real shard actors are started with, in tests."""

from __future__ import annotations

from typing import Any

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.planning.placement import ExpertGroup
from experts_service.shard.shard import ShardSpec


def shard_spec(checkpoint: Checkpoint, group: ExpertGroup, application: str, **fields: Any) -> ShardSpec:
    """Of one of two groups, in bf16 on one thread unless `fields` say otherwise."""
    usual: dict[str, Any] = {"num_groups": 2, "dtype": "bfloat16", "num_threads": 1}
    return ShardSpec(
        application=application,
        directory=str(checkpoint.directory),
        fingerprint=checkpoint.fingerprint,
        group=group.index,
        experts=group.experts,
        **(usual | fields),
    )
