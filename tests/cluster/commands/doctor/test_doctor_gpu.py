"""What `manta doctor` says of cards, told by a fake driver, and of kernels, which a CPU has as well."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.doctor import command, gpu, kernels, lanes, machine, model, steps
from cluster.commands.doctor import profile as profiles
from cluster.commands.doctor.checks import Status, good
from cluster.planning.profile import FIGURES, read_profile
from experts_service.kernels.experts import Experts
from router_service.attention.metadata import AttentionMetadata
from router_service.model.decoder import Decoder
from router_service.sampling.sampler import Sampler
from tests import fake_driver
from tests.router_service.model.test_graphs import Recorded, recorded


class Cards:
    """A driver's answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str, capability: tuple[int, int] = (9, 0)) -> None:
        self.free = 79 * 2**30
        answers: dict[str, Any] = {
            "is_available": lambda: bool(names),
            "device_count": lambda: len(names),
            "get_device_name": lambda index=0: names[index],
            "get_device_capability": lambda _: capability,
            "mem_get_info": lambda _: (self.free, 80 * 2**30),
            "memory_reserved": lambda _: 2**28,
            "can_device_access_peer": lambda one, other: abs(one - other) == 1,
            "get_arch_list": lambda: ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100"],
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def test_a_machine_without_a_driver_has_nothing_to_look_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Cards(monkeypatch)
    monkeypatch.setattr(gpu, "NVIDIA", tmp_path / "nvidiactl")
    assert gpu.driver().status is Status.NOT_APPLICABLE


@pytest.mark.parametrize(("cuda", "said"), [(None, "torch for CUDA: pip install"), ("12.8", "nvidia-smi")])
def test_a_driver_that_torch_does_not_reach_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, said: str
) -> None:
    Cards(monkeypatch)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpu, "NVIDIA", tmp_path / "nvidiactl")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", lambda: _raise(RuntimeError("The NVIDIA driver on your system is too old")))
    finding = gpu.driver()
    assert finding.status is Status.FAILED
    assert said in finding.advice
    assert ("is too old" in finding.found) == (cuda is not None), "what torch says of it"


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("capability", "built", "well"),
    [
        ((8, 9), ["sm_80", "sm_90"], True),  # 8.0's code runs on all of 8
        ((12, 0), ["sm_80", "sm_90", "sm_100"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),  # the driver translates it
        ((8, 0), ["sm_86", "sm_90"], False),
    ],
)
def test_a_card_that_torch_was_not_built_for_is_found_before_the_first_request(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str], well: bool
) -> None:
    Cards(monkeypatch, "a card", capability=capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    finding = gpu.capability()
    assert finding.status is (Status.GOOD if well else Status.FAILED)
    assert ("no kernels for" in finding.advice) != well


@pytest.mark.parametrize(
    ("mode", "status"), [("Default", Status.GOOD), ("[N/A]", Status.GOOD), ("Exclusive_Process", Status.FAILED)]
)
def test_a_card_for_one_process_alone_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, status: Status
) -> None:
    """A shard and a coordinator on one card: the second of them could not start."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '0, Default\\n1, {mode}\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = gpu.modes()
    assert (finding.status, finding.found) == (status, f"0, Default; 1, {mode}")
    assert status is Status.GOOD or "nvidia-smi -c DEFAULT -i 1:" in finding.advice


def test_each_card_multiplies_and_one_that_does_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.computes([torch.device("cpu")] * 2) == good("cpu, cpu")
    results = iter([True, False])
    monkeypatch.setattr(torch, "equal", lambda *_: next(results))
    assert gpu.computes([torch.device("cpu"), torch.device("cpu", 0)]).found == "a product on cpu:0 is not the CPU's"


def test_cards_are_told_with_kind_memory_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards(monkeypatch, *["NVIDIA H100 80GB HBM3"] * 3)
    assert gpu.driver().found.startswith("3 × NVIDIA H100 80GB HBM3, torch for CUDA ")
    assert "2: NVIDIA H100 80GB HBM3, 9.0" in gpu.capability().found
    assert gpu.peers() == good("0 → 1; 1 → 0, 2; 2 → 1")
    assert gpu.slices().status is Status.NOT_APPLICABLE
    assert gpu.memory().status is Status.GOOD
    cards.free = 40 * 2**30
    finding = gpu.memory()
    assert finding.status is Status.FAILED, "somebody else is there"
    assert "whose processes are on 0, 1, 2" in finding.advice


def test_one_card_has_no_neighbours_and_an_old_one_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, "Tesla V100-SXM2-16GB", capability=(7, 0))
    assert gpu.peers().status is Status.NOT_APPLICABLE
    finding = gpu.capability()
    assert finding.status is Status.FAILED
    assert finding.found == "0: Tesla V100-SXM2-16GB, 7.0, which has no bf16"
    assert "leave out 0" in finding.advice
    assert "engine.dtype: float32" in finding.advice


def test_rows_go_through_memory_that_the_driver_pins_or_it_is_said_that_they_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(gpu, "pin", lambda whole: pinned.append(whole.nbytes) or pinned.clear)
    finding = gpu.shared_rows(torch.device("cpu"))
    assert finding.status is Status.GOOD
    assert finding.found.startswith("32 MiB pinned in ")
    assert "; between GPUs they lie there, as the card's own memory is not shared: the package cuda-b" in finding.found
    assert pinned == [], "and unpinned"

    monkeypatch.setattr(gpu, "pin", lambda _: None)
    finding = gpu.shared_rows(torch.device("cpu"))
    assert finding.found.startswith("rows are sent, which is slower: the driver cannot")

    monkeypatch.setattr(gpu, "pin", lambda _: list)
    monkeypatch.setattr(gpu, "wait_for_queue", lambda _: _raise(RuntimeError("CUDA error: unspecified launch failure")))
    with pytest.raises(RuntimeError, match="launch failure"):
        gpu.shared_rows(torch.device("cpu"))


def test_it_is_said_that_rows_between_gpus_lie_in_the_cards_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "pin", lambda _: list)
    driver = fake_driver.FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    assert gpu.shared_rows(torch.device("cpu")).found.endswith("; between GPUs they lie in the card's own memory")
    driver.damages = True
    assert gpu.shared_rows(torch.device("cpu")).found.endswith("not shared: bytes that were copied are others")
    assert fake_driver.mappings() + fake_driver.descriptors() == 0


def test_a_slice_of_a_card_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, "NVIDIA H100 80GB HBM3 MIG 3g.40gb")
    assert "MIG 3g.40gb" in gpu.slices().found


def test_triton_compiles_or_it_is_said_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert gpu.compiles(device).status is Status.GOOD
    monkeypatch.setattr(gpu, "can_compile", lambda: False)
    assert "gcc" in gpu.compiles(device).advice


def test_what_else_tritons_first_kernel_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first request, or the start, failed with Triton's traceback."""
    device = torch.device("cpu")
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    finding = gpu.compiles(device)
    assert finding.status is Status.FAILED
    assert "cannot be written: NotADirectoryError" in finding.found
    assert "TRITON_CACHE_DIR" in finding.advice
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert "python3-dev" in gpu.compiles(device).advice


@pytest.mark.parametrize("number", range(4), ids=["experts", "attention", "sampler", "mask"])
def test_kernels_of_a_device_are_well(device: str, number: int) -> None:
    finding = kernels.checks(torch.device(device))[number].look()
    assert finding.status is Status.GOOD, finding


def test_an_expert_that_gets_anothers_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Experts, layer: int, rows: torch.Tensor, counts: Any, answers: Any = None) -> torch.Tensor:
        return called(self, layer, rows, [*counts[1:], counts[0]], answers)

    called = Experts.__call__
    monkeypatch.setattr(Experts, "__call__", shifted)
    finding = kernels.experts(torch.device("cpu"))
    assert finding.status is Status.FAILED
    assert "report it" in finding.advice


def test_attention_to_one_position_too_few_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = AttentionMetadata.__init__

    def short(self: AttentionMetadata, spans: Any, block_size: int) -> None:
        made(self, spans, block_size)
        self.context_lengths[-1] -= 1

    monkeypatch.setattr(AttentionMetadata, "__init__", short)
    monkeypatch.setattr(kernels, "HEADS", kernels.HEADS[:1])
    assert kernels.attention(torch.device("cpu")).status is Status.FAILED


def test_a_sampler_that_draws_other_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Sampler.__call__
    turns = iter([False, True])

    def drawn(self: Sampler, logits: torch.Tensor, sequences: Any) -> Any:
        return called(self, logits.roll(1, dims=-1) if next(turns) else logits, sequences)

    monkeypatch.setattr(Sampler, "__call__", drawn)
    assert kernels.sampler(torch.device("cpu")).status is Status.FAILED


def test_a_mask_that_is_not_applied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = kernels._sampled
    monkeypatch.setattr(kernels, "_sampled", lambda logits, device, _: sampled(logits, device, None))
    assert kernels.mask(torch.device("cpu")).status is Status.FAILED


@pytest.fixture
def sync_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch has been told to do where the host waits; a CPU's torch cannot be told."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    threads = torch.get_num_threads()
    yield modes
    torch.set_num_threads(threads)


def test_steps_that_only_decode_are_watched_for_waits(sync_mode: list[str]) -> None:
    finding = steps.waits(torch.device("cpu"))
    assert finding.status is Status.GOOD
    assert int(finding.found.split()[0]) >= 10
    assert sync_mode[-1] == "default"
    assert sync_mode.count("error") >= 16, "model and sampler of each"


def test_a_step_that_waits_is_found_and_told_by_what(sync_mode: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Decoder.logits

    def waiting(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        if sync_mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", waiting)
    finding = steps.waits(torch.device("cpu"))
    assert finding.status is Status.FAILED
    assert finding.found == "a step waits: RuntimeError: called a synchronizing CUDA operation"
    assert sync_mode[-1] == "default"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[Recorded]]]:
    """Engines on a CPU that have graphs of the kind that is put in here."""
    kinds: list[type[Recorded]] = [Recorded]
    build, threads = model.build_engine, torch.get_num_threads()

    def built(checkpoint: Any, config: Any, *arguments: Any, **named: Any) -> Any:
        engine = build(checkpoint, config, *arguments, **named)
        runner = engine.model_runner
        if config.cuda_graphs != "off":
            if runner.decoder.dispatcher.can_be_captured:
                runner.decoder._has_chains = False  # which are not captured
            runner.graphs = recorded(runner, lambda: kinds[-1](), 2)
        return engine

    monkeypatch.setattr(model, "build_engine", built)
    yield kinds
    torch.set_num_threads(threads)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_replayed_steps_are_compared_with_launched_ones(graphs: list[type[Recorded]], elsewhere: bool) -> None:
    finding = steps.captured(torch.device("cpu"), elsewhere=elsewhere)
    assert finding.status is Status.GOOD, finding
    assert int(finding.found.split()[0]) >= 10
    if elsewhere:
        return

    class Wrong(Recorded):
        def replay(self) -> None:
            super().replay()
            self.result.copy_(self.result.roll(1, dims=-1))

    graphs.append(Wrong)
    assert "engine.cuda_graphs: off" in steps.captured(torch.device("cpu")).advice

    class Refusing(Recorded):
        def capture(self, _run: object) -> torch.Tensor:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs.append(Refusing)
    assert "could not be captured" in steps.captured(torch.device("cpu")).found


def test_where_nothing_is_captured_there_is_nothing_to_compare() -> None:
    threads = torch.get_num_threads()
    assert steps.captured(torch.device("cpu")).status is Status.NOT_APPLICABLE
    torch.set_num_threads(threads)


def test_what_is_measured_is_a_profile_that_a_plan_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over lanes between real processes; their times say nothing on a machine that tests run on."""
    monkeypatch.setattr(lanes, "_MOST", 5)
    monkeypatch.setattr(profiles, "CPU_READ_BYTES", 2**24)
    monkeypatch.setattr(command.Examination, "checks", lambda self: _of_profile(self))
    file = tmp_path / "profile.json"
    done = CliRunner().invoke(app, ["doctor", "--profile", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert [one["name"] for one in json.loads(done.stdout)["checks"]] == ["lanes", "memory bandwidth"]
    profile = read_profile(file)
    of_lanes = {"lane_dispatch_s", "lane_group_s", "lane_bandwidth", "memory_bandwidth"}
    assert set(profile.figures) == of_lanes | {"cpu_bandwidth"} < set(FIGURES)
    assert profile.costs().lanes.dispatch_s == profile.figures["lane_dispatch_s"]


def _of_profile(examination: command.Examination) -> Any:
    examination.profile = profiles.Profile(None)
    return iter(examination.profile.checks())


def test_a_file_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiles.Profile, "checks", lambda _: ())
    monkeypatch.setattr(command.Examination, "checks", lambda self: _of_profile(self))
    done = CliRunner().invoke(app, ["doctor", "--profile", str(tmp_path / "none" / "profile.json"), "--json"])
    assert done.exit_code != 0
    assert "cannot be written" in str(done.exception)


def test_on_a_card_all_groups_are_looked_at_and_the_short_form_leaves_the_cpu_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Cards(monkeypatch, "NVIDIA L4")
    whole = [check.name for check in command.Examination(profiles=True).checks()]
    short = [check.name for check in command.Examination(short=True).checks()]
    assert set(short) < set(whole)
    assert len(whole) == len(set(whole))
    assert short[0] == "GPU driver"
    assert {"Triton", "experts on cuda:0", "model, bfloat16 on cuda:0", "waits on cuda:0"} <= set(short)
    assert not [name for name in short if "cpu" in name.lower() or name in {one.name for one in machine.CHECKS}]
    assert {"launches on cuda:0", "copies to cuda:0", "bandwidth of cuda:0"} <= set(whole)
