"""The cluster's DNS, as far as pods ask it: the addresses of some names, over UDP."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress

from tests.hosts import Host

PORT = 53
TTL_S = 30  # CoreDNS's, as kubeadm sets it up
_ANSWERED, _UNKNOWN = 0x8580, 0x8583  # an authoritative answer, and NXDOMAIN
_A, _IN = 1, 1


class NameServer:
    """Answers on a host until `stop`. `addresses` stays the caller's: what is changed there is told at once."""

    def __init__(self, host: Host, addresses: Mapping[str, str]) -> None:
        self._addresses = addresses
        self._socket = host.run(lambda: _bound(host.address))
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        """From now on nobody is answered."""
        with suppress(OSError):  # it is not connected; who waits for a query is woken all the same
            self._socket.shutdown(socket.SHUT_RD)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, asker = self._socket.recvfrom(4096)
                if not query:
                    return
                self._socket.sendto(answer(query, self._addresses), asker)
            except OSError:
                return


def _bound(address: str) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind((address, PORT))
    return found


def answer(query: bytes, addresses: Mapping[str, str]) -> bytes:
    """To a query of one name (RFC 1035, 4.1). A name without an address of the wanted kind has an empty answer."""
    labels, place = [], 12
    while length := query[place]:
        labels.append(query[place + 1 : place + 1 + length].decode())
        place += 1 + length
    question = query[12 : place + 5]
    [kind] = struct.unpack("!H", question[-4:-2])
    address = addresses.get(".".join(labels).lower())
    found = b""
    if address is not None and kind == _A:
        found = struct.pack("!HHHIH", 0xC00C, _A, _IN, TTL_S, 4) + socket.inet_aton(address)
    flags = _UNKNOWN if address is None else _ANSWERED
    return query[:2] + struct.pack("!HHHHH", flags, 1, bool(found), 0, 0) + question + found
