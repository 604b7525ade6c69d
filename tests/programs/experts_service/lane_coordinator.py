"""A coordinator in a process of its own, whose arguments are the paths of both groups' shards.

With `device` behind them it asks for slots in what stands for a GPU's memory, and sends rows of 32 in bf16.

It says `waiting` before the answers of layer 2, and `right` for as long as those of layer 1 are.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from experts_service.routing_table import Deployment, Replica
from router_service.dispatcher import Dispatcher
from tests import fake_driver
from tests.experts_service import lanes
from tests.experts_service.lanes import FINGERPRINT, GROUPS, Shards, ask, batch, expected

lanes.MEMORY = True
dtype = torch.float32
if sys.argv[3:] == ["device"]:
    fake_driver.install()
    lanes.DEVICE, lanes.HIDDEN, dtype = fake_driver.DEVICE, 32, torch.bfloat16
running = Shards()
for group, path in enumerate(sys.argv[1:3]):
    running.servers[f"{group}a"] = SimpleNamespace(path=path, port=0)  # type: ignore[assignment]
    replica = Replica(f"{group}a", f"shard-{group}a", "test", group, FINGERPRINT)
    running.table.publish(Deployment("model", f"expert-{group}"), [replica])
dispatcher = Dispatcher(GROUPS, running.transport())
rows, experts = batch(300, dtype)
assert torch.equal(ask(dispatcher, rows, experts), expected(rows, experts))
print("right", flush=True)
flight = dispatcher.dispatch(2, rows, experts)
print("waiting", flush=True)
dispatcher.combine(flight, torch.full(experts.shape, 0.5))
