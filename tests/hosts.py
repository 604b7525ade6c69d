"""Hosts made of network namespaces, each with an address and a loopback of its own. Root only; knows no Ray.

    with hosts(3) as (head, a, b):
        process = head.start(["ray", "start", "--head", …])
        a.kill()              # all processes in it
        b.cut(); b.rejoin()   # its cable out, and in again
        b.lose(0.05)          # that part of its packets, in each direction; 0: none
    b.delay(0.01)         # all of them, in each direction; for good
        head.run(ask)         # call a function on a thread whose sockets are the host's

    manta-<pid>-<n>-0             the switch: a namespace too, with a bridge and one end of every cable
    manta-<pid>-<n>-1, -2, …      the hosts: eth0, 10.77.0.1, .2, …

Nothing is added to the namespace that we run in, so the addresses clash with nobody's. Names tell whose they are: what
a killed test run left is cleared away when the next one makes hosts.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.programs import REPOSITORY

T = TypeVar("T")

_NAME = re.compile(r"manta-(\d+)-\d+-\d+")
_NETWORKS = itertools.count()
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

# Classic BPF: a random number decides, above the bound the packet goes on (-1), else it is dropped (2, TC_ACT_SHOT).
# Every kernel with cls_bpf has that; not every one has netem.
_LOAD_RANDOM, _JUMP_IF_GREATER, _RETURN = "32 0 0 4294963256", "37 0 1 {bound}", "6 0 0 {verdict}"


class NotPossible(Exception):
    """This machine cannot do it; the message says what it lacks."""


class Host:
    """One namespace, and the far end of its cable."""

    def __init__(self, name: str, address: str, switch: str, port: str) -> None:
        self.name, self.address = name, address
        self._switch, self._port = switch, port  # the namespace and the device of the cable's other end
        self._started: list[subprocess.Popen[str]] = []
        self._cables: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[str]:
        """A process on this host; `options` are Popen's."""
        process = subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)
        self._started.append(process)
        return process

    def start_quietly(self, command: Sequence[str | os.PathLike[str]], environment: dict[str, str]) -> None:
        """A process on this host whose output nobody reads."""
        self.start(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises, on a thread of this host; threads that it starts are there too."""
        outcome: Future[T] = Future()

        def work() -> None:
            try:
                with open(f"/run/netns/{self.name}") as namespace:
                    if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=work, name=self.name)
        thread.start()
        thread.join()
        return outcome.result()

    def process_ids(self) -> list[int]:
        """All processes on this host, whoever started them."""
        return [int(line) for line in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """End every process with SIGKILL; the host itself stays."""
        deadline = time.monotonic() + 10
        while running := self.process_ids():
            assert time.monotonic() < deadline, f"processes {running} on {self.name} do not die"
            for process_id in running:
                try:
                    os.kill(process_id, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        while self._started:
            self._started.pop().wait(10)

    def remove(self) -> None:
        """End what was started for it."""
        self.kill()
        for cable in self._cables:
            cable.kill()
            cable.wait(10)

    def cut(self) -> None:
        """No packet reaches it or leaves it; nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "nomaster")

    def rejoin(self) -> None:
        """The opposite."""
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")

    def lose(self, fraction: float) -> None:
        """Drop that part of its packets in each direction, at random. Raises NotPossible."""
        tc = ["tc", "-n", self._switch]
        subprocess.run([*tc, "qdisc", "del", "dev", self._port, "clsact"], capture_output=True, check=False)
        if fraction == 0:
            return
        jump = _JUMP_IF_GREATER.format(bound=int(fraction * 2**32))
        instructions = [_LOAD_RANDOM, jump, _RETURN.format(verdict=2**32 - 1), _RETURN.format(verdict=2)]
        program = ",".join([str(len(instructions)), *instructions])
        _tc(*tc, "qdisc", "add", "dev", self._port, "clsact")
        for direction in ("ingress", "egress"):
            _tc(*tc, "filter", "add", "dev", self._port, direction, "bpf", "direct-action", "bytecode", program)

    def delay(self, seconds: float) -> None:
        """Have every packet take that much longer, in each direction, from now on."""
        near, far = f"{self._port}-near", f"{self._port}-far"
        _ip("-n", self._switch, "link", "add", near, "up", "type", "veth", "peer", "name", far)
        _ip("-n", self._switch, "link", "set", far, "up", "master", "bridge")
        self.cut()
        command = ["ip", "netns", "exec", self._switch, sys.executable, "-m", "tests.slow_cable"]
        cable = subprocess.Popen([*command, self._port, near, str(seconds)], text=True, cwd=REPOSITORY)
        self._cables.append(cable)


@contextmanager
def hosts(number: int) -> Iterator[tuple[Host, ...]]:
    """That many hosts on one switch; with their processes they end with the block. Raises NotPossible."""
    if os.geteuid() != 0:
        raise NotPossible("network namespaces need root")
    for name, owner in _namespaces():
        if not Path(f"/proc/{owner}").exists():
            _remove(name)
    network = f"manta-{os.getpid()}-{next(_NETWORKS)}-"
    switch = f"{network}0"
    made: list[Host] = []
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for index in range(1, number + 1):
            made.append(_host(network, index))
        yield tuple(made)
    finally:
        for host in made:
            host.remove()
        for name, _ in _namespaces():
            if name.startswith(network):
                _remove(name)


def _host(network: str, index: int) -> Host:
    switch, name, port = f"{network}0", f"{network}{index}", f"port{index}"
    host = Host(name, f"10.77.0.{index}", switch, port)
    _ip("netns", "add", name)
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    _ip("-n", name, "route", "add", "default", "dev", "eth0")  # leads nowhere; Ray finds its own address by it
    return host


def _namespaces() -> Iterator[tuple[str, int]]:
    """Those that some test run made: name, and process id of the run."""
    for entry in json.loads(_ip("-j", "netns", "list") or "[]"):
        if match := _NAME.fullmatch(entry["name"]):
            yield entry["name"], int(match[1])


def _remove(name: str) -> None:
    Host(name, "", "", "").kill()
    _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return _tc("ip", *arguments)


def _tc(*command: str) -> str:
    """Standard output. Raises NotPossible where the tool, or what it asks of the kernel, is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise NotPossible(f"there is no `{command[0]}` here") from error
    if done.returncode != 0:
        raise NotPossible(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
