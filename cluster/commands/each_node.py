"""Calls a function on nodes of the Ray cluster that this process has joined. Knows no function, and no answer.

asked = ask_nodes(node_ids, function, *arguments)    # a process of Ray's is started on each
…
answers = heard(asked, timeout_s)                    # of those that answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

Asked = Mapping[Any, str]  # node ids by what Ray will answer with


def ask_nodes(nodes: Iterable[str], function: Callable[..., Any], *arguments: Any) -> Asked:
    """Begin on all at once. `nodes`: their ids, as `ray.nodes()` gives them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(function)
    return {
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments): node
        for node in nodes
    }


def heard(asked: Asked, timeout_s: float) -> dict[str, Any]:
    """By node id. A node that is too busy to answer in time, or that dies meanwhile, is left out."""
    import ray

    if not asked:
        return {}
    answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=timeout_s)
    answers = {}
    for one in answered:
        with suppress(ray.exceptions.RayError):
            answers[asked[one]] = ray.get(one)
    return answers
