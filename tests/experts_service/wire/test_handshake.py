"""Who may talk over a lane: both sides prove the secret and the checkpoint, and a refused peer learns nothing."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from experts_service.wire import handshake
from experts_service.wire.handshake import HandshakeRefused, ShardHandshake, check_proof, introduce, proof
from experts_service.wire.secret import ensure_lane_secret, read_lane_secret

SECRET, FINGERPRINT = b"s" * 32, "f" * 64


def meet(secret: bytes = SECRET, fingerprint: str = FINGERPRINT) -> tuple[BaseException | None, BaseException | None]:
    """What the coordinator and the shard, which has the true secret, raise."""
    ours, theirs = socket.socketpair()
    refusal: list[BaseException] = []

    def shard_side() -> None:
        side = ShardHandshake(SECRET, FINGERPRINT)
        try:
            while side.wants:
                theirs.sendall(side.receive(theirs.recv(side.wants, socket.MSG_WAITALL)))
        except HandshakeRefused as error:
            refusal.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=shard_side)
    thread.start()
    with ours:
        try:
            introduce(ours, secret, fingerprint, 60.0)
            coordinator = None
        except (HandshakeRefused, OSError) as error:
            coordinator = error
    thread.join(60)
    return coordinator, refusal[0] if refusal else None


def test_two_that_share_secret_and_checkpoint_meet() -> None:
    assert meet() == (None, None)


@pytest.mark.parametrize(
    ("secret", "fingerprint", "reason"),
    [(b"x" * 32, FINGERPRINT, "another lane secret"), (SECRET, "e" * 64, "another checkpoint")],
)
def test_a_refused_coordinator_learns_nothing(secret: bytes, fingerprint: str, reason: str) -> None:
    coordinator, shard = meet(secret, fingerprint)
    assert reason in str(shard)
    assert "closed the connection" in str(coordinator), "the same words whatever was wrong"


def test_a_shard_without_the_secret_is_refused() -> None:
    ours, theirs = socket.socketpair()

    def pretend() -> None:
        theirs.recv(handshake.HELLO_BYTES, socket.MSG_WAITALL)
        theirs.sendall(handshake.hello(handshake.SHARD))
        theirs.recv(handshake.PROOF_BYTES, socket.MSG_WAITALL)
        theirs.sendall(bytes(handshake.PROOF_BYTES))

    thread = threading.Thread(target=pretend)
    thread.start()
    with ours, theirs, pytest.raises(HandshakeRefused, match="another lane secret"):
        introduce(ours, SECRET, FINGERPRINT, 60.0)
    thread.join(60)


def test_the_proof_of_one_side_does_not_serve_for_the_other() -> None:
    mirrored = proof(SECRET, FINGERPRINT, handshake.COORDINATOR, b"transcript")
    check_proof(mirrored, SECRET, FINGERPRINT, handshake.COORDINATOR, b"transcript")
    with pytest.raises(HandshakeRefused):
        check_proof(mirrored, SECRET, FINGERPRINT, handshake.SHARD, b"transcript")
    with pytest.raises(HandshakeRefused):
        check_proof(mirrored, SECRET, FINGERPRINT, handshake.COORDINATOR, b"another one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hello: b"GET / HT" + hello[8:], "does not speak"),
        (lambda hello: hello[:8] + b"\x09" + hello[9:], "lane version 9"),
        (lambda hello: hello[:10] + b"\x02" + hello[11:], "came as 'shard'"),
    ],
)
def test_another_protocol_version_or_role_is_refused(change: Callable[[bytes], bytes], reason: str) -> None:
    with pytest.raises(HandshakeRefused, match=reason):
        ShardHandshake(SECRET, FINGERPRINT).receive(change(handshake.hello(handshake.COORDINATOR)))


def test_a_silent_shard_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        introduce(ours, SECRET, FINGERPRINT, 0.1)


def test_the_secret_is_made_once_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = ensure_lane_secret()
    assert path == tmp_path / ".manta" / "lane_secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    secret = read_lane_secret(path)
    assert len(secret) == 64
    assert read_lane_secret(ensure_lane_secret()) == secret
    assert list(path.parent.iterdir()) == [path], "no draft is left"


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("a" * 64)
    for mode in (0o644, 0o640, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_lane_secret(path)
    path.chmod(0o600)
    assert read_lane_secret(path) == b"a" * 64


def test_a_secret_that_is_missing_short_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ensure_lane_secret(tmp_path / "none")
    short = tmp_path / "short"
    short.touch(0o600)
    with pytest.raises(ConfigError, match="0 bytes"):
        read_lane_secret(short)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="not a file"):
        read_lane_secret(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before), "a directory was left open each time"
