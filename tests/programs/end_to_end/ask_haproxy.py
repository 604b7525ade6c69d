"""Asks HAProxy's admin socket something, at each of the paths: what it answers, or why it does not."""

import socket
import sys

for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(path)
            channel.sendall(b"show info\n")
            print(channel.recv(4096).decode().splitlines()[0])
        except OSError as error:
            print(error.strerror)
