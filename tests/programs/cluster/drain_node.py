"""What the preStop hook of a pod runs, with its arguments: says whether the node was drained."""

import sys

from cluster.commands.k8s.drain import run

print(run(float(sys.argv[1]), *sys.argv[2:]))
