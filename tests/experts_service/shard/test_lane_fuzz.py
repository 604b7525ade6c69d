"""Ten thousand damaged frames at a running shard: it stays up, answers the next good frame, and never unpickles."""

from __future__ import annotations

import logging
import pickle
import random
import select
import socket
from typing import Any, NoReturn

import pytest
import torch

from experts_service.carriers import exchange_kernels
from experts_service.kernels import finite
from experts_service.shard import serve_kernel
from experts_service.wire.frame import RowsFormat
from experts_service.wire.handshake import COORDINATOR, hello
from router_service.dispatcher import Dispatcher
from tests.experts_service.lanes import GROUPS, HIDDEN, NUM_LAYERS, ask, batch, expected, shards

NUM_FRAMES = 10_000


def damaged(random_: random.Random) -> bytes:
    """A frame of rows with a few bytes changed, cut, or repeated; or a pickle that would call somebody."""
    rows = random_.randint(1, 20)
    first = random_.randint(0, rows)
    head = RowsFormat(2).pack(
        torch.float32, 1, 0, random_.randrange(NUM_LAYERS), 1, rows, HIDDEN, 1000, (first, rows - first)
    )
    frame = bytearray(head + random_.randbytes(rows * HIDDEN * 4))
    match random_.randrange(5):
        case 0:
            for _ in range(random_.randint(1, 8)):
                frame[random_.randrange(len(head))] = random_.randrange(256)
        case 1:
            del frame[random_.randrange(len(frame)) :]
        case 2:
            frame[:0] = frame[: random_.randint(1, len(frame) - 1)]
        case 3:
            frame = bytearray(random_.randbytes(random_.randint(1, 300)))
        case 4:
            frame = bytearray(pickle.dumps((print, ("a damaged frame was unpickled",))))
    return bytes(frame)


def send(peer: socket.socket, data: bytes) -> bool:
    """Whether the shard still listens to this peer."""
    try:
        peer.send(data, socket.MSG_DONTWAIT)
        while select.select([peer], [], [], 0)[0]:
            if not peer.recv(1 << 16, socket.MSG_DONTWAIT):
                return False
    except BlockingIOError:
        return False  # it waits for the rest of what looked like a large frame
    except OSError:
        return False
    return True


def test_damaged_frames_harm_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    random_ = random.Random(20)
    frames = [damaged(random_) for _ in range(NUM_FRAMES)]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("something was unpickled")

    finite.load()  # compiled code that this user kept is unpickled, by whoever looks at answers first
    exchange_kernels.load()
    serve_kernel.load()
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    with shards() as running, caplog.at_level(logging.WARNING):
        for group in (0, 1):
            running.start(f"{group}a", group)
        remote = Dispatcher(GROUPS, running.transport())
        rows, experts = batch(9)
        transport = running.transport()
        server = running.servers["0a"]
        replica = running.table.replicas(transport.deployments[0])[0]
        peer: socket.socket | None = None
        for index, frame in enumerate(frames):
            if index % 10 == 0:  # before any handshake, too
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.connect(str(server.path))
                    send(stranger, frame if index % 20 else hello(COORDINATOR) + frame)
                continue
            peer = peer or transport.routes._links._dialer(replica, 5.0).channel
            if not send(peer, frame) or random_.random() < 0.1:
                peer.close()
                peer = None
            if index % 500 == 1:
                assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        if peer is not None:
            peer.close()
        assert torch.equal(ask(remote, rows, experts), expected(rows, experts))
        stats = server.stats()
        assert stats.refused > NUM_FRAMES / 20
        assert running.dialled.count("1a") == 1, "the good coordinator kept its connections"
    assert len(caplog.records) < 200, "a flood of bad peers is not a flood of warnings"
