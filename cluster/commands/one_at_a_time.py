"""Lets one process at a time do something with a Ray cluster.

Who does it on a cluster that was joined is an actor, which ends with its process. On one that the process has started
itself it is a note in the cluster's key-value store, as both end together.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster.errors import SetupError, Unavailable

NAMESPACE = "manta"
ENDING_S = 10.0  # for the actor of a process that has just ended
ASK_TIMEOUT_S = 20.0  # it may still start, on a busy machine


class _Doer:
    """Its name is what is done."""

    def __init__(self, who: str) -> None:
        self._who = who

    def who(self) -> str:
        return self._who


@contextmanager
def one_at_a_time(what: str, *, on_own_cluster: bool = False) -> Iterator[None]:
    """While it lasts, nobody else enters for the same thing on the cluster that this process has joined.

    `on_own_cluster`: this process has started it. A note costs no process of Ray.
    Raises SetupError where somebody does, with who it is, and Unavailable where that is not to be had.
    """
    import ray
    from ray.experimental import internal_kv

    me = f"process {os.getpid()} on {socket.gethostname()}"
    if on_own_cluster:
        internal_kv._internal_kv_put(what, me, namespace=NAMESPACE)
        yield
        return
    if (owner := internal_kv._internal_kv_get(what, namespace=NAMESPACE)) is not None:
        raise _runs_already(what, owner.decode())
    options: dict[str, Any] = {"name": what, "namespace": NAMESPACE, "num_cpus": 0}
    deadline = time.monotonic() + ENDING_S
    while True:
        try:
            doer = ray.remote(_Doer).options(**options).remote(me)
            break
        except ValueError:  # the name is taken
            if (other := _who_does(what)) is not None:
                raise _runs_already(what, other) from None
            if time.monotonic() > deadline:
                raise Unavailable(f"{what} ran on this cluster, and Ray does not let go of its name") from None
            time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):
            ray.kill(doer)  # sooner than Ray would


def _runs_already(what: str, who: str) -> SetupError:
    return SetupError(f"{what} runs on this cluster already: {who}")


def _who_does(what: str) -> str | None:
    """None where it has just ended."""
    import ray

    try:
        who: str = ray.get(ray.get_actor(what, NAMESPACE).who.remote(), timeout=ASK_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayActorError):
        return None
    except ray.exceptions.GetTimeoutError:
        return "its process does not say which it is"
    return who
