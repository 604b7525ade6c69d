"""Joins a running Ray cluster for a look at it, within a deadline. Starts nothing, and knows nothing of Serve.

Ray's own waits for a cluster that does not answer are minutes long and cannot be interrupted, and its native code ends
the process that has lost its cluster, or calls it after having left, without a word. So a process of its own joins,
looks and leaves, and is killed where it takes too long.

    this process ── forks ──▶ one that imports Ray, joins, looks
                 ◀─ pipe ──── what it does now …, what it saw or what it raised; or the end of the pipe
                 ── pipe ends ─▶ it leaves; a driver that was killed is a failure in the cluster's log
                 ── is killed ─▶ SIGTERM, by which Ray leaves: what it waits for may never come
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cluster.commands.local_ray import ray_environment
from cluster.commands.parents import end_with_parent
from cluster.commands.raylets import silent
from cluster.errors import MantaError, SetupError, Unavailable

CONNECT_TIMEOUT_S = 3.0
DEADLINE_S = 40.0  # for each step; importing and joining Ray takes seconds on a busy machine
LEAVE_TIMEOUT_S = 2.0
BUSY = 1.5  # a process that takes so many times as long as alone is on a busy machine

_START = "start one with `manta serve`, or name one with --address HOST:PORT"

# The steps, each with what is said where it does not end in time. What stands still accepts connections all the same.
_IMPORTING = "Ray could not be imported"
_GREETING = "its GCS stands still, or this machine is overloaded (`gcs_server`, on the head)"
_NO_RAYLET = "its GCS answers, and the raylet of this machine stands still or has died (`raylet`)"
_JOINING = "it could not be joined"
_LOOKING = "it was joined, and does not say how it is"

_FORK = multiprocessing.get_context("fork")  # what is to be looked at need not be pickled

T = TypeVar("T")


class JoinedCluster(NamedTuple):
    """What one is a driver of."""

    address: str
    logs: Path  # of its processes on this machine, where others may have left theirs


def look_at_cluster(
    address: str, look: Callable[[JoinedCluster], T], deadline_s: float = DEADLINE_S, look_s: float | None = None
) -> T:
    """Join the cluster at `address` ("auto" or host:port), call `look` in a process of its own, and leave.

    Each step has the deadline; `look_s`: that of the look itself, where it may take longer. Raises Unavailable when no
    cluster runs there or it does not answer in time, SetupError for an address of another form.
    """
    with closing(watch_cluster(address, look, None, deadline_s, look_s)) as looks:
        return next(looks)


def watch_cluster(
    address: str,
    look: Callable[[JoinedCluster], T],
    interval_s: float | None,
    deadline_s: float = DEADLINE_S,
    look_s: float | None = None,
) -> Generator[T, None, None]:
    """The same, again and again `interval_s` apart, until the generator is closed. None: once."""
    ray_environment.prepare()
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _knock(address)
    ours, theirs = _FORK.Pipe()
    looking = _FORK.Process(target=_work, args=(address, look, interval_s, theirs, ours), daemon=True)
    looking.start()
    theirs.close()
    step = _IMPORTING
    assert looking.pid is not None
    try:
        while True:
            limit_s = look_s if step == _LOOKING and look_s is not None else deadline_s
            if not ours.poll(limit_s):
                slow = slowness(looking.pid)
                looking.kill()
                raise _silent(address, step, limit_s, slow)
            try:
                outcome = ours.recv()
            except EOFError:
                raise Unavailable(
                    f"the Ray cluster at {address} stopped answering: Ray ended the process that asked it"
                ) from None
            if isinstance(outcome, str):
                step = outcome
                continue
            seen, error = outcome
            if error is not None:
                raise error
            yield seen
    finally:
        ours.close()
        looking.join(LEAVE_TIMEOUT_S)
        looking.kill()
        looking.join()


def _silent(address: str, step: str, limit_s: float, slow: float) -> Unavailable:
    busy = f"; this machine is so busy that programs take {slow:.1f} times as long: try again" if slow >= BUSY else ""
    return Unavailable(f"the Ray cluster at {address} did not answer within {limit_s:g} s: {step}{busy}")


def slowness(pid: int) -> float:
    """How many times as long as alone a process has taken to compute, by its first thread."""
    try:
        ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())  # ns; for a core, not for events
    except (OSError, ValueError):  # no such file without Linux
        return 1.0
    return (ran + waited) / ran if ran else 1.0


def _work(
    address: str,
    look: Callable[[JoinedCluster], T],
    interval_s: float | None,
    outcomes: Connection,
    of_parent: Connection,  # the pipe's other end, which would never end while it is open here
) -> None:
    """All that the process does that looks. Whoever started it may kill it at any time."""
    of_parent.close()
    if sys.platform == "linux":
        end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other one
    with open(os.devnull, "w") as nowhere:  # Ray's native code logs there, whatever is configured
        os.dup2(nowhere.fileno(), 2)

    def look_again(cluster: JoinedCluster) -> None:
        while True:
            outcomes.send((look(cluster), None))
            if interval_s is None or outcomes.poll(interval_s):  # only its end can come
                return

    try:
        _join_and_look(address, look_again, outcomes.send)
    except BrokenPipeError:
        return
    except SystemExit:  # Ray's way to give up on joining
        outcomes.send((None, Unavailable(f"the Ray cluster at {address} cannot be joined; {_START}")))
    except MantaError as error:
        outcomes.send((None, error))
    except BaseException as error:
        error.add_note(traceback.format_exc())  # which no pipe carries
        _send_error(error, outcomes)
    finally:
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()


def _send_error(error: BaseException, outcomes: Connection) -> None:
    """As it is, or in words where it cannot be pickled."""
    try:
        outcomes.send((None, error))
    except Exception:
        outcomes.send((None, RuntimeError("".join(traceback.format_exception(error)))))


def _knock(address: str) -> None:
    """See within seconds whether anything listens; Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise SetupError(f"{address!r} is not the address of a Ray cluster; expected auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a name such as a..b
        raise Unavailable(f"no Ray cluster answers at {address} ({error}); {_START}") from error


def _none_here() -> str:
    """Ray looks for raylets. Where one has died, what it started may answer clients still, for seconds."""
    import psutil

    if any((one.info["cmdline"] or [""])[0].startswith("ray::") for one in psutil.process_iter(["cmdline"])):
        return (
            "no raylet runs on this machine, and processes that one has started are left: it has died, or was just "
            "stopped. Clients may be answered for a while; end what started it, and start it again"
        )
    return f"no Ray cluster is running on this machine; {_START}"


def _join_and_look(address: str, look: Callable[[JoinedCluster], T], begins: Callable[[str], Any]) -> T:
    import ray
    from ray._private.services import canonicalize_bootstrap_address, get_node_ip_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        if (gcs := canonicalize_bootstrap_address(address)) is not None:
            begins(_GREETING)
            no_raylet = False
            with suppress(Exception):  # joining says it better
                client = GcsClient(address=gcs)  # asks for the cluster's id
                no_raylet = silent(client, get_node_ip_address(gcs))
            if no_raylet:
                raise Unavailable(f"the Ray cluster at {address} cannot be joined: {_NO_RAYLET}")
            begins(_JOINING)
        context = ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ray.exceptions.AuthenticationError as error:
        raise Unavailable(
            f"the Ray cluster at {address} wants a token: have the cluster's in ~/.ray/auth_token, "
            "or name its file in RAY_AUTH_TOKEN_PATH"
        ) from error
    except ConnectionError as error:
        if address == "auto":
            raise Unavailable(_none_here()) from error
        raise Unavailable(
            f"the Ray cluster at {address} cannot be joined; is the token in ~/.ray/auth_token the cluster's own?"
        ) from error
    except (ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise Unavailable(f"the Ray cluster at {address} cannot be joined: {error}") from error
    try:
        begins(_LOOKING)
        joined = context.address_info
        return look(JoinedCluster(str(joined["gcs_address"]), Path(joined["session_dir"]) / "logs"))
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the Ray cluster at {address} stopped answering: {error}") from error
