"""Makes a coordinator's connection to a shard: asks the actor where it listens now, connects, proves who we are."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from experts_service.carriers.link import LinkLost
from experts_service.routing_table import Replica
from experts_service.shard_handles import NoHandle, ShardHandles
from experts_service.wire.address import LaneAddress, connect
from experts_service.wire.handshake import TIMEOUT_S, HandshakeRefused, introduce
from experts_service.wire.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0  # a shard that is being restarted is asked again later, so that others are not kept waiting

AddressOf = Callable[[Replica, float], LaneAddress]  # replica, timeout in seconds; raises OSError
Dialer = Callable[[Replica, float], "Dialled"]  # the same; raises LinkLost


class Dialled(NamedTuple):
    """An authenticated connection."""

    channel: socket.socket
    thread_id: int = 0  # of the one thread that computes at its other end, on this machine; 0: it is not here
    memory: SharedMemory | None = None  # that the other end maps as well


class LaneDialer:
    """Dials with one secret and for one checkpoint."""

    def __init__(
        self,
        address_of: AddressOf,
        *,
        secret: bytes,
        fingerprint: str,
        node_id: str,
        of_tiers: Mapping[str, str] | None = None,
        memory: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """`of_tiers`: the fingerprint of those that round the checkpoint otherwise than the others.

        `memory`: ask shards on this node for some to share; `device`: and for some of their GPUs, to be used from ours.
        """
        self._address_of = address_of
        self._secret = secret
        self._fingerprint = fingerprint
        self._of_tiers = of_tiers or {}
        self._memory = memory
        self._device = device
        self._node_id = node_id  # of this process; shards there are reached by Unix socket

    def __call__(self, replica: Replica, timeout_s: float) -> Dialled:
        """Raises LinkLost at the latest after `timeout_s`."""
        deadline = time.monotonic() + min(timeout_s, ASK_TIMEOUT_S + TIMEOUT_S)
        try:
            address = self._address_of(replica, min(timeout_s, ASK_TIMEOUT_S))
            channel = connect(address, self._node_id, max(0.001, deadline - time.monotonic()))
        except OSError as error:
            raise LinkLost(f"it cannot be reached: {error}") from error
        try:
            fingerprint = self._of_tiers.get(replica.tier, self._fingerprint)
            here = channel.family == socket.AF_UNIX
            timeout_s = max(0.001, deadline - time.monotonic())
            memory = introduce(
                channel, self._secret, fingerprint, timeout_s, memory=self._memory and here, device=self._device
            )
        except (HandshakeRefused, OSError) as error:
            channel.close()
            logger.warning("no lane to %s: %s", replica.actor, error)
            raise LinkLost(f"no handshake: {error}") from error
        return Dialled(channel, address.thread_id if here else 0, memory)


def ask_shard(handles: ShardHandles, replica: Replica, timeout_s: float) -> LaneAddress:
    """Where the shard listens, by its actor's own word. Raises OSError."""
    import ray
    from ray.exceptions import ActorDiedError, RayError

    deadline = time.monotonic() + timeout_s
    try:
        shard = handles.get(replica, timeout_s)
        address: LaneAddress = ray.get(shard.lane_address.remote(), timeout=max(0.0, deadline - time.monotonic()))
    except NoHandle as error:
        raise OSError(str(error)) from error
    except RayError as error:
        if isinstance(error, ActorDiedError):
            handles.forget(replica)
        raise OSError(f"the shard {replica.actor} does not say where it listens ({type(error).__name__})") from error
    return address
