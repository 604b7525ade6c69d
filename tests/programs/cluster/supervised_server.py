"""A server under its supervisor, without Ray: starts a process that outlives it, says which, and ends as it is told."""

import os
import signal
import subprocess
import sys
import time

from cluster.commands.serve import supervised
from cluster.errors import MantaError, Unavailable


def ends_well():
    pass


def ends_with_3():
    raise SystemExit(3)


def ends_natively():
    os._exit(1)


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def gives_up():
    supervised.give_up(Unavailable("Ray has died"))


def waits():
    try:
        print("waits", flush=True)
        while True:
            time.sleep(0.2)  # a signal just before does not cut it short
    except KeyboardInterrupt:
        print("interrupted", flush=True)


def starts():
    print("starts", flush=True)
    time.sleep(600)


def holds_on():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("holds", flush=True)
    while True:
        time.sleep(600)


supervised.LEFT_S = 0.3
supervised.INTERRUPTED_S = supervised.LEAVE_S = 0.3 if sys.argv[1] == "holds_on" else 60.0
try:
    supervised.supervise(waits_for_streams=False)
    # As HAProxy: its parent goes, and it is in no group and no session of the server's.
    outlives = (
        "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3, start_new_session=True).pid)"
    )
    print(
        subprocess.run([sys.executable, "-c", outlives], stdout=subprocess.PIPE, text=True, check=True).stdout, end=""
    )
    sys.stdout.flush()
    globals()[sys.argv[1]]()
except MantaError as error:
    print(error, file=sys.stderr)
    raise SystemExit(2) from None
