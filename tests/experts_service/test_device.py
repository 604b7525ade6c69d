"""What a process does with its device, where a fake driver stands for a GPU's."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from experts_service.device import on_host, pin
from experts_service.shard.shard import DEVICE_IS_GONE
from router_service.attention import choice
from router_service.attention.choice import attention_backend
from tests.programs import REPOSITORY, program


@pytest.mark.parametrize(("lost", "code", "said"), [("lost", DEVICE_IS_GONE, ""), ("short", 0, "goes on\n")])
def test_a_shard_whose_device_is_gone_ends_and_one_that_is_short_of_memory_goes_on(lost, code, said):
    """A CUDA error sticks: the shard answered "failed" for ever, and was asked again and again."""
    done = subprocess.run(
        program("experts_service.lose_device", lost),
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, said), done.stderr
    if lost == "lost":
        assert "expert-0 ends: its device is gone" in done.stderr


def test_cudnn_makes_no_plan_for_every_length(monkeypatch, checkpoint):
    monkeypatch.setattr(choice, "can_compile", lambda: False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    attention_backend(checkpoint.architecture, block_size=16, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_on_the_host_already_is_not_copied():
    rows = torch.arange(6.0).view(3, 2)
    assert on_host(rows).data_ptr() == rows.data_ptr()
    assert on_host(rows.t()).is_contiguous()


@pytest.mark.parametrize("error", [0, 1])
def test_memory_that_a_driver_cannot_pin_is_used_as_it_is(monkeypatch, error):
    """Its error is taken away as well: torch would blame the next kernel for it."""
    registered, asked = {}, []

    def register(address, size, flags):
        registered[address] = size
        return error

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)

    def ones(*_, **device):
        asked.append(device)
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(torch, "ones", ones)
    memory = torch.empty(4096, dtype=torch.uint8)
    undo = pin(memory)
    assert registered == {memory.data_ptr(): 4096}
    if error:
        assert undo is None
        assert asked == [{"device": "cuda"}]
    else:
        undo()
        assert (registered, asked) == ({}, [])


def test_a_device_that_is_gone_ends_nobody_who_would_pin_memory_for_it(monkeypatch):
    """The thread that serves all of a shard's lanes ended with it."""

    def lost():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "cudart", lost)
    assert pin(torch.empty(4096, dtype=torch.uint8)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_of_a_gpu_come_through_pinned_memory():
    rows = torch.arange(6.0, device="cuda").view(3, 2)
    assert on_host(rows.t()).is_pinned()
    assert on_host(rows.t()).tolist() == rows.t().tolist()
