"""Sends back what it gets on TCP port 7777."""

import socket

listener = socket.create_server(("0.0.0.0", 7777))
while True:
    channel, _ = listener.accept()
    while data := channel.recv(100):
        channel.sendall(data)
