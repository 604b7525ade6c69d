"""A replica that is drained when standard input has a line or ends.

Arguments: its grace, and how long Serve has to see that it ends; both in seconds.
"""

# ruff: noqa: E402
import asyncio
import signal
import sys
import threading
import time
import types

GRACE_S, SERVE_SEES_IT_S = map(float, sys.argv[1:])


def ray_ends_the_worker(*_):
    raise SystemExit(1)


class Actor:
    class perform_graceful_shutdown:  # noqa: N801  # Ray's name
        @staticmethod
        async def remote():
            print("drains", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            print("drained", flush=True)


signal.signal(signal.SIGTERM, ray_ends_the_worker)
context = types.SimpleNamespace(current_actor=Actor)
sys.modules["ray"] = types.SimpleNamespace(get_runtime_context=lambda: context)
from cluster import termination
from cluster.errors import Unavailable

termination.LINGER_S = 0.0


async def replica():
    end = termination.Termination(GRACE_S, on_begin=lambda: print("begun", flush=True), serve_sees_it_s=SERVE_SEES_IT_S)
    end.check()
    print("up", flush=True)
    while True:
        await asyncio.sleep(0.02)
        try:
            end.check()
        except Unavailable:
            break
    print("unhealthy", flush=True)
    await asyncio.sleep(60)


threading.Thread(target=asyncio.run, args=(replica(),), daemon=True).start()
for _ in range(300):
    time.sleep(0.2)  # a signal just before does not cut it short
