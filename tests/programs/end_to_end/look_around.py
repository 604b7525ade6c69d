"""What the user who runs it can do with the files below the arguments: kind and path of each that it could open."""

import os
import socket
import stat
import sys

for root in sys.argv[1:]:
    for directory, _names, files in os.walk(root):
        print("folder", directory)
        for path in (os.path.join(directory, name) for name in files):
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    kind = socket.SOCK_DGRAM if "/metrics" in path else socket.SOCK_STREAM
                    with socket.socket(socket.AF_UNIX, kind) as channel:
                        channel.connect(path)
                    print("socket", path)
                elif stat.S_ISREG(os.lstat(path).st_mode):
                    open(path, "rb").close()
                    print("file", path)
            except OSError:
                continue
