"""Which kernel a process gets: what is configured, what the CPU has, what is fastest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.config import parse_config
from cluster.errors import ConfigError
from experts_service.kernels import cores, selection, speeds
from experts_service.kernels.compiled import matmul
from experts_service.kernels.compiled.routine import Routine
from experts_service.kernels.cores import cores as count_cores
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.kernel import Kernel, available
from experts_service.kernels.selection import choose, select

CPU = torch.device("cpu")
BF16 = torch.bfloat16
ALL = (Kernel.DOT, Kernel.FMA, Kernel.ONEDNN, Kernel.TORCH)
AMX = {  # where oneDNN has matrix units, and reads few rows slower
    Kernel.DOT: (1.0, 1.1, 2.4, 8.0),
    Kernel.FMA: (1.0, 1.2, 4.2, 16.0),
    Kernel.ONEDNN: (1.5, 1.2, 1.3, 1.5),
}


@pytest.fixture
def all_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "available", lambda: ALL)


def test_auto_gives_up_batch_invariance_only_for_more_than_a_tenth() -> None:
    assert choose(AMX, prefers_own=True).kernel is Kernel.ONEDNN
    level = {**AMX, Kernel.ONEDNN: tuple(0.92 * seconds for seconds in AMX[Kernel.DOT])}
    assert choose(level, prefers_own=True).kernel is Kernel.DOT
    assert choose(level, prefers_own=False).kernel is Kernel.ONEDNN


def test_of_ours_it_is_the_one_that_the_cpu_has_not_the_one_that_was_a_bit_faster_today() -> None:
    """Two machines of one kind measured it either way, and a shard's replicas had different bits."""
    close = {Kernel.DOT: (1.0, 1.0, 1.0, 1.0), Kernel.FMA: (0.95, 1.0, 1.0, 1.0)}
    assert choose(close, prefers_own=True).kernel is Kernel.DOT


def test_what_is_chosen_is_compiled_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request after a start waited for the compiler."""
    own = [kernel for kernel in available() if kernel.is_own]
    if not own:
        pytest.skip("numba cannot be imported")
    loaded: list[object] = []
    monkeypatch.setattr(Routine, "load", lambda routine: loaded.append(routine))
    select(BF16, CPU, batch_invariant="on")
    assert loaded == [matmul._multiply, matmul._networks]


@pytest.mark.usefixtures("all_available")
def test_on_measures_nothing_and_what_is_said_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "speeds", lambda _kernels: pytest.fail("nothing is to be measured"))
    assert select(BF16, CPU, batch_invariant="on").kernel is Kernel.DOT
    assert select(BF16, CPU, batch_invariant="on", kernels="fma").kernel is Kernel.FMA
    assert select(BF16, CPU, kernels="onednn").kernel is Kernel.ONEDNN
    assert not select(BF16, CPU, kernels="onednn").batch_invariant
    assert select(torch.float32, CPU).kernel is Kernel.TORCH  # bitwise what it was


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (torch.bfloat16, "meta")])
def test_where_torch_multiplies_it_is_said_that_batch_invariance_cannot_be_had(
    dtype: torch.dtype, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`on` was taken and nobody told: in fp32 a row alone and beside another differed in most of its numbers."""
    for setting in ("auto", "off", "on"):
        assert not caplog.messages
        selection = select(dtype, torch.device(device), batch_invariant=setting)
        assert selection.kernel is Kernel.TORCH
        assert not selection.batch_invariant
    (message,) = caplog.messages
    name = str(dtype).removeprefix("torch.")
    assert message.startswith(f"engine.batch_invariant: on has no effect: torch multiplies {name} on {device}")


def test_on_a_gpu_our_kernels_multiply_where_batch_invariance_is_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no effect, and a warning."""
    monkeypatch.setattr(selection, "compiles_for", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    kernels = {
        setting: select(BF16, torch.device("cuda"), batch_invariant=setting) for setting in ("auto", "off", "on")
    }
    assert {setting: str(one.kernel) for setting, one in kernels.items()} == {
        "auto": "torch",
        "off": "torch",
        "on": "triton",
    }
    assert kernels["on"].batch_invariant
    assert not caplog.messages


def test_a_gpu_without_kernels_of_ours_is_said_to_need_more_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts small numbers as small; without a C compiler they are widened."""
    monkeypatch.setattr(selection, "compiles_for", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    select(BF16, torch.device("cuda"))
    (message,) = caplog.messages
    assert "no kernels of ours run on this GPU" in message
    assert "quantised weights are widened and take more memory than planned" in message


def test_a_card_without_bf16_is_refused_by_name_and_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a T4 torch multiplies bf16 number by number, or raises in the first step: whoever serves was told neither."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    compiles_for.cache_clear()
    with pytest.raises(ConfigError, match=r"engine.dtype: Tesla T4 \(compute capability 7\.5\) has no bfloat16; set"):
        select(BF16, torch.device("cuda"))
    assert select(torch.float32, torch.device("cuda")).kernel is Kernel.TORCH
    compiles_for.cache_clear()


def test_what_this_cpu_cannot_do_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "available", lambda: (Kernel.TORCH,))  # numba cannot be imported
    with pytest.raises(ConfigError, match=r"engine.kernels: dot does not run here; torch do"):
        select(BF16, CPU, kernels="dot")
    with pytest.raises(ConfigError, match=r"engine.batch_invariant: on needs a kernel of our own"):
        select(BF16, CPU, batch_invariant="on")
    assert select(BF16, CPU).kernel is Kernel.TORCH
    with pytest.raises(ConfigError, match="batch_invariant: on needs kernels of our own"):
        parse_config(
            {"models": [{"name": "m", "path": "demo", "engine": {"kernels": "torch", "batch_invariant": "on"}}]}
        )


def test_speeds_are_measured_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "cache_directory", lambda: tmp_path)
    measured = speeds.speeds(available())
    assert all(0 < seconds < 60 for of_kernel in measured.values() for seconds in of_kernel)
    monkeypatch.setattr(speeds, "_measure", lambda _kernels: pytest.fail("it was measured already"))
    assert speeds.speeds(available()) == measured
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({"dot": [1]})[:-3])  # a process ended while it wrote
    monkeypatch.setattr(speeds, "_measure", lambda _kernels: measured)
    assert speeds.speeds(available()) == measured


def test_a_full_disk_ends_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speeds, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert speeds.speeds([Kernel.TORCH]).keys() == {Kernel.TORCH}


def test_a_containers_quota_counts_as_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod of one core on a machine with 64 computed with 64 threads, and stood still most of the time."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "self")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "self").write_text("0::/pod/box\n")
    (tmp_path / "pod" / "box").mkdir(parents=True)
    assert count_cores() == 64
    (tmp_path / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "pod" / "cpu.max").write_text("250000 100000\n")
    assert count_cores() == 3
