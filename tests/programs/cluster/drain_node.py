"""What the preStop hook of a pod runs, with its arguments: says whether the node was drained."""

import sys

from cluster.commands.k8s import drain

drain.ALL_TOLD_S = 1.0  # nobody else is told here
print(drain.run(float(sys.argv[1]), *sys.argv[2:], say=lambda text: print(text, file=sys.stderr, flush=True)))
