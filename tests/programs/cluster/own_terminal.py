"""`manta` with its arguments, and the terminal on its standard input for its own: there Ctrl-C is a key."""

import fcntl
import termios

from cluster.cli import main

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main()
