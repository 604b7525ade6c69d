"""How rows and answers cross between host and GPU: by one copy in each direction, on tensors without memory."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experts_service.delivery.flight import RemoteFlight
from experts_service.kernels.experts import Experts, expert_tensor_names
from experts_service.shard import batch
from experts_service.shard.batch import run_as_one
from experts_service.shard.shard import ExpertShard, ShardSpec
from experts_service.transport import GroupRows
from tests.fake_gpu import DEVICE, fake_gpu

HIDDEN, INTERMEDIATE = 32, 64


@pytest.fixture
def counts(monkeypatch):
    with fake_gpu(monkeypatch) as counted:
        yield counted


@pytest.fixture
def shard_on_gpu(counts):
    weights = {}
    for expert in range(2):
        w1, w2, w3 = expert_tensor_names(0, expert)
        weights[w1] = weights[w3] = torch.empty(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
        weights[w2] = torch.empty(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16, device=DEVICE)
    shard = object.__new__(ExpertShard)  # without loading
    shard._spec = ShardSpec("app", "", "", 0, (0, 1), 1, "bfloat16", "cuda")
    shard._experts = Experts((0, 1), [weights])
    shard._one_at_a_time = threading.Lock()
    shard._rows, shard._calls, shard._busy_s = [0, 0], 0, 0.0
    return shard


def test_a_shard_waits_once_for_its_gpu(shard_on_gpu, counts):
    """Rows go there from the frame's memory, and how many each expert has; answers come back into pinned memory."""
    before = counts.copy()
    answer = shard_on_gpu._run(0, torch.empty(3, HIDDEN, dtype=torch.bfloat16, pin_memory=True), (2, 1))
    counts -= before
    assert (answer.device.type, tuple(answer.shape)) == ("cpu", (3, HIDDEN))
    assert shard_on_gpu._rows == [2, 1]
    assert counts.waits == {"to host": 1}
    assert (counts.copies_to_device, counts.copies_to_host) == (2, 1)
    assert counts.bytes_to_host == 3 * HIDDEN * 2


def test_its_answers_are_copied_to_where_they_belong(shard_on_gpu, counts):
    """A slot, say, which the coordinator maps as well: nothing is copied on the host."""
    before = counts.copy()
    place = torch.empty(3, HIDDEN, dtype=torch.bfloat16)
    answer = shard_on_gpu._run(0, torch.empty(3, HIDDEN, dtype=torch.bfloat16), (2, 1), place)
    counts -= before
    assert answer is place
    assert counts.waits == {"to host": 1}
    assert (counts.copies_to_device, counts.copies_to_host) == (2, 1)


def test_answers_of_all_groups_go_to_the_gpu_by_one_copy_that_nobody_waits_for(monkeypatch):
    monkeypatch.setattr(RemoteFlight, "_rejected", lambda _: [])  # it looks at numbers
    deliveries = SimpleNamespace(
        clock=time.monotonic,
        look_at_table=lambda: None,
        timeout_s=1.0,
        answers_soon=False,
        settle=lambda waiting, soon: [],
    )
    with fake_gpu(monkeypatch) as counts:
        rows, answers = torch.empty(2, HIDDEN), torch.empty(4, HIDDEN, device=DEVICE)
        parts = [GroupRows(group, np.array([0, 1]), (2,), answers, 2 * group) for group in range(2)]
        flight = RemoteFlight(deliveries, 0, rows, parts)
        assert flight.received.device.type == "cpu"
        flight.wait()
    assert not counts.waits
    assert (counts.copies_to_device, counts.bytes_to_device) == (1, 4 * HIDDEN * 4)
    assert counts.copies_to_host == 0


@pytest.mark.parametrize("for_gpu", [False, True])
def test_rows_of_several_coordinators_are_merged_in_pinned_memory_for_a_gpu(monkeypatch, for_gpu):
    pinned = []
    monkeypatch.setattr(
        batch, "pinned", lambda shape, dtype: pinned.append(torch.empty(shape, dtype=dtype)) or pinned[0]
    )
    seen = []

    def run(layer, rows, counts, answers):
        seen.append(rows)
        return rows + 100

    rows = torch.tensor([[1.0], [2.0], [3.0]])
    frames = [(rows, (2, 1), None), (10 * rows, (1, 2), None)]
    answers = run_as_one(run, 0, frames, for_gpu=for_gpu)
    assert [answer.flatten().tolist() for answer in answers] == [[101, 102, 103], [110, 120, 130]]
    assert [rows is seen[0] for rows in pinned] == [True] * for_gpu


@pytest.fixture
def stream(monkeypatch, counts):
    """Whoever waits for it is counted."""
    queue = SimpleNamespace(synchronize=lambda: counts.waits.update(["queue"]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: queue)


@pytest.mark.usefixtures("stream")
def test_a_shard_that_has_rows_and_answers_on_its_gpu_waits_once_and_copies_nothing(shard_on_gpu, counts):
    """Whoever asked is told when the answer is written, and not when it has been launched."""
    rows, place = (torch.empty(3, HIDDEN, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    before = counts.copy()
    assert shard_on_gpu._run(0, rows, (2, 1), place) is place
    counts -= before
    assert counts.waits == {"queue": 1}
    assert (counts.copies_to_device, counts.copies_to_host) == (1, 0), "how many each expert has"


@pytest.mark.usefixtures("stream")
def test_rows_on_a_gpu_are_merged_there_with_others(shard_on_gpu, counts):
    there, place = (torch.empty(3, HIDDEN, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    here, slot = (torch.empty(3, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    before = counts.copy()
    frames = [(there, (2, 1), place), (here, (1, 2), slot), (here, (1, 2), None)]
    answers = run_as_one(shard_on_gpu._run, 0, frames, for_gpu=True)
    counts -= before
    assert answers[0] is place
    assert answers[1] is slot
    assert (answers[2].device.type, answers[2].shape) == ("cpu", here.shape)
    assert counts.copies_to_host == 2, "of the two that came by the host"
