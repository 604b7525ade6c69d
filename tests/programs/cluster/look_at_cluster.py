"""Looks at the cluster of its argument, and waits six seconds for it."""

import sys

from cluster.commands.cluster_connection import look_at_cluster

look_at_cluster(sys.argv[1], str, deadline_s=6)
