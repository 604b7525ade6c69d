"""Has `manta serve` go on in a process of its own, ends it in time, and ends what it leaves. Knows no Ray.

    manta serve ── forks ──▶ the server: Ray, Serve, and all that they start
         │ SIGINT, SIGTERM ─▶ it ends; when its time is over, it is killed
         └─ it has ended, however: so does what is left of what it started, HAProxy for example

Ray's native code may hold all of Python for a minute, and ends the process without a word where it has lost its GCS.
Neither reaches this one, which has no other thread and waits for signals alone.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

import psutil

from cluster.commands.local_ray.private_files import session_logs
from cluster.commands.parents import adopt_orphans, end_with_parent
from cluster.errors import MantaError, Unavailable

INTERRUPTED_S, TERMINATED_S = 5.0, 60.0  # what open streams get to end after Ctrl-C, and after SIGTERM
LEAVE_S = 20.0  # for the server to end after that
AT_ONCE_S = 5.0  # after a second signal
LEFT_S = 5.0  # for what a server has left that ended well
KILLED_S = 10.0  # until what was killed is gone, but for what the kernel holds

_BEFORE_IT_LISTENED = -1000  # no signal has that number
_SAID = b"."  # by a server that ends as Python ends

_words: int | None = None  # where the server says how it ends


def supervise(*, waits_for_streams: bool) -> None:
    """Return in a process of its own. This one stays until that has ended, and ends as it has: it does not return.

    `waits_for_streams`: the server is given what time it takes after a signal, as its cluster is another's.
    Raises Unavailable, in words, where it was killed or ended without one.
    """
    global _words
    if sys.platform != "linux":
        return
    adopt_orphans()
    passed_on = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        passed_on.add(signal.SIGHUP)
    supervisor = os.getpid()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    server = os.fork()
    if server == 0:
        os.close(reading)
        end_with_parent(signal.SIGINT)
        if os.getppid() != supervisor:
            os._exit(1)
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, from the supervisor
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write there all the same
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _words = writing
        atexit.register(_say, _SAID)
        return
    os.close(writing)
    code, was_killed = _wait(server, passed_on, waits_for_streams=waits_for_streams)
    _end_what_is_left(LEFT_S if code == 0 else 0.0)
    if code == _BEFORE_IT_LISTENED:
        raise SystemExit(0)
    os.set_blocking(reading, False)
    with suppress(BlockingIOError):
        _end_as(code, was_killed, os.read(reading, 65_536))
    _end_as(code, was_killed, b"")


def give_up(error: MantaError) -> NoReturn:
    """End the server at once: Ray, without its GCS or raylet, would hold it up. The supervisor says why, and ends all.

    Raises the error where there is no supervisor.
    """
    if _words is None:
        raise error
    _say(error.message.encode())
    os._exit(2)


def _say(words: bytes) -> None:
    assert _words is not None
    with suppress(OSError):  # the supervisor was killed
        os.write(_words, words)


def _wait(server: int, passed_on: set[signal.Signals], *, waits_for_streams: bool) -> tuple[int, bool]:
    """Its exit code, negative for a signal's, and whether it took too long to end.

    _BEFORE_IT_LISTENED where a signal ended it that was passed on: it had not started anything yet.
    """
    ends_at, was_asked, was_killed = float("inf"), False, False
    while True:
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            os.kill(server, signal.SIGKILL)
            ends_at, was_killed = float("inf"), True
            continue
        received = signal.sigtimedwait({*passed_on, signal.SIGCHLD}, min(left_s, 3600.0))
        if received is None:
            continue
        if received.si_signo == signal.SIGCHLD:
            code = _reap(server)
            if code is not None:
                return _BEFORE_IT_LISTENED if was_asked and code == -signal.SIGTERM else code, was_killed
            continue
        number = signal.SIGTERM if received.si_signo == signal.SIGTERM else signal.SIGINT
        os.kill(server, number)
        if was_asked:
            ends_at = min(ends_at, time.monotonic() + AT_ONCE_S)
        elif not waits_for_streams:
            drain_s = TERMINATED_S if number == signal.SIGTERM else INTERRUPTED_S
            ends_at = time.monotonic() + drain_s + LEAVE_S
        was_asked = True


def _reap(server: int = 0) -> int | None:
    """Take note of all children that have ended; the exit code of the server, if it is among them."""
    code = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == server:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def _end_what_is_left(grace_s: float) -> None:
    kill_at = time.monotonic() + grace_s
    while left := psutil.Process().children(recursive=True):
        if time.monotonic() >= kill_at:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
        if time.monotonic() > kill_at + KILLED_S:
            return
        time.sleep(0.1)
        _reap()


def _end_as(code: int, was_killed: bool, words: bytes) -> NoReturn:
    if words == _SAID:
        raise SystemExit(code)
    if words:
        raise Unavailable(words.removesuffix(_SAID).decode())
    logs = session_logs()
    where = "" if logs is None else f" Its logs: {logs}"
    if was_killed:
        raise Unavailable(f"the server did not end in time, so it was killed with all that it had started.{where}")
    how = f"exit code {code}, as of Ray where it loses its GCS" if code >= 0 else signal.Signals(-code).name
    raise Unavailable(f"the server's process was ended without a word ({how}); all that it had started is, too.{where}")
