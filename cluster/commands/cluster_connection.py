"""Joins a running Ray cluster for a look at it, within a deadline. Starts nothing, and knows nothing of Serve.

Ray's own waits for a cluster that does not answer are minutes long and cannot be interrupted, so joining and looking
run in a daemon thread.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from cluster.commands import ray_environment
from cluster.commands.raylets import silent
from cluster.errors import SetupError, Unavailable

CONNECT_TIMEOUT_S = 3.0
LEAVE_TIMEOUT_S = 10.0
DEADLINE_S = 40.0  # for each step; importing and joining Ray takes seconds on a busy machine

_START = "start one with `manta serve`, or name one with --address HOST:PORT"

# The steps, each with what is said where it does not end in time. What stands still accepts connections all the same.
_IMPORTING = "Ray could not be imported"
_GREETING = "its GCS stands still, or this machine is overloaded (`gcs_server`, on the head)"
_NO_RAYLET = "its GCS answers, and the raylet of this machine stands still or has died (`raylet`)"
_JOINING = "it could not be joined"
_LOOKING = "it was joined, and does not say how it is"

T = TypeVar("T")


class JoinedCluster(NamedTuple):
    """What one is a driver of."""

    address: str
    logs: Path  # of its processes on this machine, where others may have left theirs


def look_at_cluster(address: str, look: Callable[[JoinedCluster], T], deadline_s: float = DEADLINE_S) -> T:
    """Join the cluster at `address` ("auto" or host:port), call `look`, and leave.

    Raises Unavailable when none runs there or it does not answer in time, SetupError for an address of another form.
    """
    with closing(watch_cluster(address, look, threading.TIMEOUT_MAX, deadline_s)) as looks:
        return next(looks)


def watch_cluster(
    address: str, look: Callable[[JoinedCluster], T], interval_s: float, deadline_s: float = DEADLINE_S
) -> Generator[T, None, None]:
    """The same, again and again `interval_s` apart, until the generator is closed. Each step has the deadline."""
    ray_environment.prepare()
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        _knock(address)
    outcomes: queue.SimpleQueue[str | tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    left = threading.Event()

    def look_again(cluster: JoinedCluster) -> None:
        while True:
            outcomes.put((look(cluster), None))
            if left.wait(interval_s):
                return

    def work() -> None:
        try:
            _join_and_look(address, look_again, outcomes.put)
        except SystemExit:  # Ray's way to give up on joining
            outcomes.put((None, Unavailable(f"the Ray cluster at {address} cannot be joined; {_START}")))
        except BaseException as error:
            outcomes.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    step = _IMPORTING
    with _stderr_silenced() as stay_silent:
        thread.start()
        try:
            while True:
                outcome = outcomes.get(timeout=deadline_s)
                if isinstance(outcome, str):
                    step = outcome
                    continue
                seen, error = outcome
                if error is not None:
                    raise error
                assert seen is not None
                yield seen
        except queue.Empty:
            stay_silent()  # it goes on in its thread
            raise Unavailable(f"the Ray cluster at {address} did not answer within {deadline_s:g} s: {step}") from None
        except (GeneratorExit, KeyboardInterrupt):
            left.set()
            thread.join(LEAVE_TIMEOUT_S)
            raise


def _knock(address: str) -> None:
    """See within seconds whether anything listens; Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise SetupError(f"{address!r} is not the address of a Ray cluster; expected auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
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


@contextmanager
def _stderr_silenced() -> Iterator[Callable[[], None]]:
    """Ray's native code logs to file descriptor 2, whatever is configured; what matters of it comes as an error.

    Yields what to call where it is to stay so: Python's own stderr is another descriptor then.
    """
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    stays: list[bool] = []
    try:
        yield lambda: stays.append(True)
    finally:
        if stays:
            sys.stderr = os.fdopen(saved, "w", buffering=1)
        else:
            os.dup2(saved, 2)
            os.close(saved)


def _join_and_look(address: str, look: Callable[[JoinedCluster], T], begins: Callable[[str], None]) -> T:
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
    finally:
        ray.shutdown()
