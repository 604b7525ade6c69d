"""A sitecustomize, which every process imports first: those with an engine, the coordinators, live at another time."""

import os
import sys
import time

now = time.time
AHEAD_S = float(os.environ["MANTA_TEST_AHEAD_S"])
time.time = lambda: now() + (AHEAD_S if "router_service.engine" in sys.modules else 0)
