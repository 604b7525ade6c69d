"""Checks of any machine: versions, cores, memory, files, sockets, a compiler. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from cluster.commands.doctor import NVIDIA
from cluster.commands.doctor.checks import Check, Finding, failed, good, not_applicable
from cluster.commands.doctor.container import memory_left
from cluster.commands.haproxy import open_files_needed
from cluster.commands.local_ray.start import SERVER_OBJECT_STORE_BYTES
from cluster.planning.placement import gib
from experts_service.kernels.cores import cores
from experts_service.wire.address import LaneAddress, connect, listen_tcp, listen_unix

SHOWN = ("torch", "triton", "ray", "transformers")
LEAST_MEMORY = 3 * 2**30  # the demo's processes, Ray's and Serve's among them
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHARED_MEMORY = Path("/dev/shm")
COMPILERS = ("gcc", "clang")  # that Triton looks for, after $CC


def versions() -> Finding:
    """Of Python and all packages, against what Manta was made with."""
    wrong = []
    for text in importlib.metadata.requires("manta-serve") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed or 'missing'}, not {requirement.specifier}")
    if wrong:
        return failed("; ".join(wrong), "install Manta again into an environment of its own")
    shown = [f"{name} {_version(name) or 'none'}" for name in SHOWN]
    return good(", ".join([f"Python {platform.python_version()}", *shown]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> Finding:
    """How many cores this process has."""
    number = cores()
    found = f"{number} of {os.cpu_count()}, by affinity and the container's quota"
    if number < 2:
        return failed(found, "give it a second core: Ray, the gateway and the model take turns on one")
    return good(found)


def memory() -> Finding:
    """Of the machine, and what is free of it, or of this process's container."""
    of_machine, of_container = psutil.virtual_memory(), memory_left()
    found, free = f"{gib(of_machine.available)} of {gib(of_machine.total)} are free", of_machine.available
    if of_container is not None and of_container < free:
        found, free = f"{gib(of_container)} are left to this container", of_container
    if free < LEAST_MEMORY:
        return failed(found, f"free some: the processes of the demo alone take about {gib(LEAST_MEMORY)}")
    return good(found)


def huge_pages() -> Finding:
    """Whether the kernel gives them to those who ask."""
    if not HUGE_PAGES.exists():
        return not_applicable("this kernel has none")
    [chosen] = [word.strip("[]") for word in HUGE_PAGES.read_text().split() if word.startswith("[")]
    if chosen == "never":
        return failed("never", f"as root: echo madvise > {HUGE_PAGES}")
    return good(chosen)


def open_files() -> Finding:
    """How many a process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_number(soft)}, up to {_number(hard)} where a process asks for it"
    if hard != resource.RLIM_INFINITY and hard < open_files_needed():
        return failed(found, "raise it: ulimit -Hn 65536, LimitNOFILE=65536 in systemd")
    return good(found)


def _number(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)


def shared_memory() -> Finding:
    """Where Ray's object store lies."""
    if not SHARED_MEMORY.is_dir():
        return failed(f"there is no {SHARED_MEMORY}", f"mount one: mount -t tmpfs tmpfs {SHARED_MEMORY}")
    free = shutil.disk_usage(SHARED_MEMORY).free
    found = f"{gib(free)} of {SHARED_MEMORY} are free"
    if free < SERVER_OBJECT_STORE_BYTES:
        return failed(
            found, f"make it larger: docker run --shm-size 2g; Ray's store takes {gib(SERVER_OBJECT_STORE_BYTES)}"
        )
    return good(found)


def loopback() -> Finding:
    """A byte over a Unix socket where lanes have theirs, and over TCP."""
    unix, path = listen_unix()
    with unix, listen_tcp("127.0.0.1") as tcp:
        try:
            port = int(tcp.getsockname()[1])
            for listener, address in (
                (unix, LaneAddress(str(path), "127.0.0.1", 0, "here", "")),
                (tcp, LaneAddress("", "127.0.0.1", port, "here", "")),
            ):
                _send_a_byte(listener, address)
        finally:
            path.unlink(missing_ok=True)
    return good(f"a Unix socket in {path.parent}, TCP on 127.0.0.1")


def _send_a_byte(listener: socket.socket, address: LaneAddress) -> None:
    """Raises OSError."""
    with connect(address, "here", 2.0) as channel:
        listener.settimeout(2.0)
        peer, _ = listener.accept()
        with peer:
            channel.sendall(b"1")
            peer.settimeout(2.0)
            if peer.recv(1) != b"1":
                raise OSError("a byte that was sent did not arrive")


def compiler() -> Finding:
    """The one that Triton finds."""
    found = next((path for name in (os.environ.get("CC"), *COMPILERS) if name and (path := shutil.which(name))), None)
    if found is not None:
        return good(found)
    if not NVIDIA.exists():
        return not_applicable("there is none, and no GPU that needs one: what CPUs run is compiled by numba")
    return failed("there is none", "apt-get install gcc libc6-dev, or name one in $CC")


CHECKS = (
    Check("versions", "Manta's packages are those that it is tested with.", versions),
    Check("cores", "Threads of the coordinator and of the experts share them.", processor),
    Check("memory", "Weights, keys and values of a CPU's models lie there.", memory),
    Check("huge pages", "Weights on a CPU are read up to a third faster from them.", huge_pages),
    Check("open files", "Each stream and each lane is an open file.", open_files),
    Check("shared memory", "Ray's object store lies there.", shared_memory),
    Check("loopback", "Rows reach experts on this machine by sockets, and clients the server.", loopback),
    Check("C compiler", "Triton needs one to start a kernel on a GPU for the first time.", compiler),
)
