"""Opens the checkpoint of its argument and names all modules that this took."""

import sys

from cluster.checkpoint.checkpoint import open_checkpoint

open_checkpoint(sys.argv[1])
print(*sys.modules)
