"""Starts HAProxy as Serve's HAProxyManager does, and another that takes over for each line that it is told.

Prints the pid of each. Arguments: the program, and the configuration.
"""

import subprocess
import sys

COMMAND = [sys.argv[1], "-f", sys.argv[2], "-db"]


def main() -> None:
    started = [subprocess.Popen(COMMAND)]
    print(started[-1].pid, flush=True)
    for _ in sys.stdin:
        started.append(subprocess.Popen([*COMMAND, "-sf", *(str(one.pid) for one in started)]))
        print(started[-1].pid, flush=True)


if __name__ == "__main__":
    main()
