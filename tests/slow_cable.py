"""A cable that takes its time: frames that come in at one device leave by the other, that many seconds later.

    python -m tests.slow_cable DEVICE OTHER SECONDS     # in both directions, until it is ended

In user space, because not every kernel has netem. Checksums and segmentation that the kernel has put off stay put off:
each frame carries its header of them along.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING, _ALL = 263, 15, 23, 0x0003
_FRAME_BYTES = 70_000


def tap(device: str) -> socket.socket:
    channel = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    for option in (_VNET_HDR, _IGNORE_OUTGOING):
        channel.setsockopt(_SOL_PACKET, option, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
    channel.bind((device, _ALL))
    return channel


def carry(near: socket.socket, far: socket.socket, seconds: float) -> None:
    other = {near.fileno(): far, far.fileno(): near}
    mine = {near.fileno(): near, far.fileno(): far}
    due: deque[tuple[float, socket.socket, bytes]] = deque()
    poll = select.poll()
    for descriptor in mine:
        poll.register(descriptor, select.POLLIN)
    while True:
        patience_s = max(0.0, due[0][0] - time.monotonic()) if due else 10.0
        for descriptor, _ in poll.poll(patience_s * 1000):
            due.append((time.monotonic() + seconds, other[descriptor], mine[descriptor].recv(_FRAME_BYTES)))
        while due and due[0][0] <= time.monotonic():
            _, channel, frame = due.popleft()
            channel.send(frame)


if __name__ == "__main__":
    carry(tap(sys.argv[1]), tap(sys.argv[2]), float(sys.argv[3]))
