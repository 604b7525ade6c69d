"""What the Serve deployments of expert groups are called. Knows names only.

expert-2          group 2, on its only tier or on the first of several
expert-2-tier1    group 2, on another one: that at position 1 of `experts.tiers`
"""

from __future__ import annotations

import re

_NAME = re.compile(r"expert-(\d+)(?:-tier\d+)?")


def expert_deployment_name(group: int, tier: int | None = None) -> str:
    """Of a group; `tier` is the position of one that is not the group's first."""
    return f"expert-{group}" if tier is None else f"expert-{group}-tier{tier}"


def group_of(deployment: str) -> int | None:
    """The group that a deployment has replicas of; None: it is none of experts."""
    match = _NAME.fullmatch(deployment)
    return int(match[1]) if match else None


def first_deployment(deployment: str) -> str:
    """That of the same group's first tier; of a deployment of something else, itself."""
    group = group_of(deployment)
    return deployment if group is None else expert_deployment_name(group)
