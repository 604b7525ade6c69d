"""The least that a dispatch takes on a machine: its bytes to other processes and back. Knows no frame and no tensor."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

END_S = 10.0
_ECHO = """
import socket, sys
channel, data = socket.socket(fileno=int(sys.argv[1])), memoryview(bytearray(int(sys.argv[2])))
while True:
    filled = 0
    while filled < len(data):
        count = channel.recv_into(data[filled:])
        if not count:
            sys.exit()
        filled += count
    channel.sendall(data)
"""


@contextmanager
def echoes(number: int, num_bytes: int) -> Iterator[Callable[[], None]]:
    """A function that sends as many bytes to each of so many processes, and returns once all have sent them back."""
    with ExitStack() as stack:
        channels = []
        for _ in range(number):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-I", "-S", "-c", _ECHO, str(theirs.fileno()), str(num_bytes)]
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)  # Ctrl-C is ours
            stack.callback(process.wait, END_S)
            channels.append(stack.enter_context(ours))  # closed first, which ends the process
        sent, received = bytes(num_bytes), memoryview(bytearray(num_bytes))

        def round_trip() -> None:
            for channel in channels:
                channel.sendall(sent)
            for channel in channels:
                filled = 0
                while filled < num_bytes:
                    count = channel.recv_into(received[filled:])
                    if not count:
                        raise ConnectionError("a process of the benchmark ended")
                    filled += count

        yield round_trip
