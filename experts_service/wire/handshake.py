"""How the two ends of a lane prove that they belong together, before any frame. Knows the secret, not the maths.

    coordinator → shard    hello: magic, version, role, nonce [32]
    shard → coordinator    hello
    coordinator → shard    proof: HMAC of the transcript [32], HMAC of transcript and fingerprint [32]
    shard → coordinator    proof, and to a coordinator that asked for memory: slots, bytes of one, a descriptor,
                           and if it asked for some of the shard's GPU as well, one of that

The transcript is both hellos, so a proof covers both roles, both nonces and the version, and begins with the role that
gives it: neither side's proof serves for the other. Whoever does not like what it reads closes the connection without a
word and logs why; a refused peer learns nothing, not even which of secret, role, version or fingerprint was wrong.
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from struct import Struct

import torch

from experts_service.wire.shared_memory import DESCRIPTION, MemoryRefused, SharedMemory, accept, receive

MAGIC = b"MNTA-HI\n"
VERSION = 4
COORDINATOR, SHARD = 1, 2  # roles
HOST, DEVICE = 1, 2  # memory that a coordinator asks for: the host's, or that and the shard's GPU's
TIMEOUT_S = 5.0

_HELLO = Struct("<8sHBB32s")
HELLO_BYTES = _HELLO.size
PROOF_BYTES = 64
NO_MEMORY = DESCRIPTION.pack(0, 0)
_ROLE_NAMES = {COORDINATOR: "coordinator", SHARD: "shard"}


class HandshakeRefused(Exception):
    """The peer may not talk to us. The message is for the log of this side only."""


def hello(role: int, *, memory: int = 0) -> bytes:
    """The first message of either side, with a fresh nonce. `memory`: which a coordinator asks for; 0: none."""
    return _HELLO.pack(MAGIC, VERSION, role, memory, os.urandom(32))


def check_hello(message: bytes, role: int) -> int:
    """Which memory the peer asks for. Raises HandshakeRefused unless it speaks our version in the role we expect."""
    magic, version, theirs, memory, _ = _HELLO.unpack(message)
    if magic != MAGIC or memory > (DEVICE if role == COORDINATOR else 0):
        raise HandshakeRefused("the peer does not speak Manta's lanes")
    if version != VERSION:
        raise HandshakeRefused(f"the peer speaks lane version {version}, this side {VERSION}")
    if theirs != role:
        raise HandshakeRefused(f"the peer came as {_ROLE_NAMES.get(theirs, theirs)!r}, not as {_ROLE_NAMES[role]!r}")
    return int(memory)


def proof(secret: bytes, fingerprint: str, role: int, transcript: bytes) -> bytes:
    """What `role` shows: that it knows the secret, and which checkpoint it means."""
    message = bytes([role]) + transcript
    return _mac(secret, b"secret" + message) + _mac(secret, b"checkpoint" + message + fingerprint.encode())


def check_proof(message: bytes, secret: bytes, fingerprint: str, role: int, transcript: bytes) -> None:
    """Raises HandshakeRefused unless `role` gave this proof. Compares in constant time."""
    expected = proof(secret, fingerprint, role, transcript)
    same_secret = hmac.compare_digest(message[:32], expected[:32])
    same_checkpoint = hmac.compare_digest(message[32:], expected[32:])
    if not same_secret:
        raise HandshakeRefused("the peer has another lane secret")
    if not same_checkpoint:
        raise HandshakeRefused("the peer means another checkpoint than this side serves")


class ShardHandshake:
    """The shard's side, message by message, for a server that never blocks."""

    def __init__(self, secret: bytes, fingerprint: str) -> None:
        self._secret = secret
        self._fingerprint = fingerprint
        self._transcript = b""
        self.wants = HELLO_BYTES  # bytes of the next message; 0 once the peer has proved itself
        self.wants_memory = 0  # HOST or DEVICE, once it has asked for it
        self.deadline = time.monotonic() + TIMEOUT_S

    def receive(self, message: bytes) -> bytes:
        """Take a message of `wants` bytes; returns the reply. Raises HandshakeRefused."""
        if self.wants == HELLO_BYTES:
            self.wants_memory = check_hello(message, COORDINATOR)
            reply = hello(SHARD)
            self._transcript = message + reply
            self.wants = PROOF_BYTES
            return reply
        check_proof(message, self._secret, self._fingerprint, COORDINATOR, self._transcript)
        self.wants = 0
        return proof(self._secret, self._fingerprint, SHARD, self._transcript)


def introduce(
    connection: socket.socket,
    secret: bytes,
    fingerprint: str,
    timeout_s: float = TIMEOUT_S,
    *,
    memory: bool = False,
    device: torch.device | None = None,
) -> SharedMemory | None:
    """The coordinator's side, on a connected socket; what the shard shares, if we ask for `memory` and it can.

    `device`: our own, and memory of the shard's is asked for as well. Raises HandshakeRefused, or OSError; changes the
    socket's timeout.
    """
    deadline = time.monotonic() + timeout_s
    ours = hello(COORDINATOR, memory=0 if not memory else HOST if device is None else DEVICE)
    connection.settimeout(timeout_s)
    connection.sendall(ours)
    theirs = _receive(connection, HELLO_BYTES, deadline)
    check_hello(theirs, SHARD)
    connection.sendall(proof(secret, fingerprint, COORDINATOR, ours + theirs))
    descriptors: list[int] = []
    try:
        last = _receive(connection, PROOF_BYTES + (DESCRIPTION.size if memory else 0), deadline, descriptors, device)
        check_proof(last[:PROOF_BYTES], secret, fingerprint, SHARD, ours + theirs)
        given, descriptors = descriptors, []
        return accept(last[PROOF_BYTES:], given, device) if memory else None
    except MemoryRefused as error:
        raise HandshakeRefused(str(error)) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(
    connection: socket.socket,
    count: int,
    deadline: float,
    descriptors: list[int] | None = None,
    device: torch.device | None = None,
) -> bytes:
    received, most = b"", 1 if device is None else 2
    while len(received) < count:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the peer took too long to introduce itself")
        connection.settimeout(remaining)
        missing = count - len(received)
        if descriptors is None:
            piece = connection.recv(missing)
        else:
            piece = receive(connection, missing, descriptors, most=most)
        if not piece:
            raise HandshakeRefused("the peer closed the connection: its log says why")
        received += piece
    return received


def _mac(secret: bytes, message: bytes) -> bytes:
    return hmac.digest(secret, message, "sha256")
