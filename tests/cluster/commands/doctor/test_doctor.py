"""`manta doctor`: one run of the command on this machine, and each branch that this machine does not take."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.commands.doctor import command, cpu, machine, model
from cluster.commands.doctor.checkpoint import Model
from cluster.commands.doctor.checks import UNEXPECTED, Check, Result, Status, failed, good, not_applicable, run_check
from cluster.demo_model import DIRECTORY as DEMO
from experts_service.kernels import cores
from router_service.model.decoder import Decoder
from tests.checkpoints import write_checkpoint

Run = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Run:
    """Exit code and document."""
    manta = Path(sys.executable).with_name("manta")
    done = subprocess.run([manta, "doctor", "--json"], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_command_looks_at_this_machine_and_its_exit_code_says_whether_all_is_well(run: Run) -> None:
    code, document = run
    by_name = {one["name"]: one for one in document["checks"]}
    assert len(by_name) == len(document["checks"]), "each has a name of its own"
    assert code == (0 if document["ok"] else 1)
    assert document["ok"] == all(one["status"] != "failed" for one in document["checks"])
    for name in ("versions", "loopback", "CPU kernels", "model, float32 on cpu", "model, bfloat16 on cpu"):
        assert by_name[name]["status"] == "good", by_name[name]
    assert f"torch {torch.__version__}" in by_name["versions"]["found"]
    for one in document["checks"]:
        assert one["meaning"].endswith(".")
        assert bool(one["advice"]) == (one["status"] == "failed"), one


def test_a_whole_model_is_compared_token_by_token(run: Run) -> None:
    for dtype in ("float32", "bfloat16"):
        [found] = [one["found"] for one in run[1]["checks"] if one["name"] == f"model, {dtype} on cpu"]
        right, of_all = found.split(" tokens")[0].split(" of ")
        assert int(right) == int(of_all) >= 30


def test_a_model_that_says_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the kernels would be seen: here the logits are shifted by one token."""
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: logits(self, hidden).roll(1, dims=-1))
    threads = torch.get_num_threads()
    result = run_check(model.checks(torch.device("cpu"))[0])
    torch.set_num_threads(threads)
    assert result.status is Status.FAILED
    assert result.found.startswith("0 of ")
    assert "serve nothing" in result.advice


def test_whatever_a_check_raises_is_its_failure_in_one_line() -> None:
    def look() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")

    result = run_check(Check("one", "It matters.", look))
    assert result.status is Status.FAILED
    assert result.found == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert result.advice == UNEXPECTED


def test_what_is_shown_has_a_mark_for_each_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*checks: Check) -> tuple[bool, str]:
        monkeypatch.setattr(command.Examination, "checks", lambda _: iter(checks))
        return command.run(as_json=False), capsys.readouterr().out

    well = Check("cores", "They are shared.", lambda: good("2 of [2]"))
    none = Check("GPU", "It computes.", lambda: not_applicable("there is none"))
    bad = Check("memory", "Weights lie there.", lambda: failed("1 GiB", "buy some"))
    ended_well, out = shown(well, none)
    assert ended_well
    assert "✓ cores: 2 of [2]\n    They are shared.\n– GPU: there is none\n" in out
    assert out.endswith("1 ✓, 0 ✗, 1 –\n")
    ended_well, out = shown(well, bad)
    assert not ended_well
    assert "✗ memory: 1 GiB\n    Weights lie there.\n    To do: buy some.\n" in out


Memory = namedtuple("Memory", ("total", "available"))
Disk = namedtuple("Disk", ("total", "used", "free"))


def test_a_machine_that_is_too_small_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(4 * 2**30, 2**30))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Disk(2**26, 0, 2**26))
    pages = tmp_path / "enabled"
    pages.write_text("always madvise [never]\n")
    monkeypatch.setattr(machine, "HUGE_PAGES", pages)
    advice = {
        machine.processor: "a second core",
        machine.memory: "free some",
        machine.open_files: "ulimit -Hn",
        machine.shared_memory: "--shm-size",
        machine.huge_pages: f"echo madvise > {pages}",
    }
    for look, said in advice.items():
        finding = look()
        assert finding.status is Status.FAILED
        assert said in finding.advice
    pages.unlink()
    assert machine.huge_pages().status is Status.NOT_APPLICABLE
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert "there is no" in machine.shared_memory().found


def test_a_package_that_is_missing_or_of_another_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.10.0", "ray": None}
    version = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: versions[name] if name in versions else version(name))
    finding = machine.versions()
    assert finding.status is Status.FAILED
    assert "torch is 2.10.0, not <2.14,>=2.11" in finding.found
    assert "ray is missing" in finding.found
    assert "gguf" not in finding.found, "what only benchmarks need may be missing"


def test_a_compiler_is_needed_only_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "nvidiactl")
    assert machine.compiler().status is Status.NOT_APPLICABLE
    (tmp_path / "nvidiactl").touch()
    assert machine.compiler().status is Status.FAILED
    (tmp_path / "cc").touch(mode=0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert machine.compiler().found == str(tmp_path / "cc")


def test_without_numba_it_is_said_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    finding = cpu.compiled()
    assert finding.status is Status.FAILED
    assert "torch computes" in finding.found


def examined(name: str | Path) -> dict[str, Result]:
    return {check.name: run_check(check) for check in Model(str(name)).checks()}


def test_a_model_is_read_and_weighed_against_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    results = examined(DEMO)
    assert [one.status for one in results.values()] == [Status.GOOD] * 3
    assert "4 layers, 8 experts, 2 for a token" in results["checkpoint"].found
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**23, 2**23))
    assert "manta plan" in examined(DEMO)["weights"].advice
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**24, 2**24))
    [most] = re.findall(r"set engine.max_model_len, (\d+) at most", examined(DEMO)["weights"].advice)
    assert 0 < int(most) < 32768


def test_a_containers_memory_counts_and_not_its_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `docker run --memory 2g` on a large machine all was well, and the demo's processes were killed."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "self")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(2**36, 2**36))
    assert machine.memory().found == "64.00 GiB of 64.00 GiB are free", "a machine without control groups"
    (tmp_path / "self").write_text("4:memory:/old\n0::/pod/box\n")
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "pod" / "box" / "memory.max").write_text("max\n")
    assert machine.memory().status is Status.GOOD
    pod = tmp_path / "pod"
    (pod / "memory.max").write_text(f"{2**31}\n")
    (pod / "memory.current").write_text(f"{2**31 - 2**29}\n")
    (pod / "memory.stat").write_text(f"anon 5\ninactive_file {2**29}\n")
    finding = machine.memory()
    assert (finding.status, finding.found) == (Status.FAILED, "1.00 GiB are left to this container")
    (pod / "memory.current").write_text(f"{2**31 + 2**29 - 2**23}\n")
    assert "manta plan" in examined(DEMO)["weights"].advice, "8 MiB"


def test_a_model_that_cannot_be_read_is_told_once_with_what_is_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    [result] = examined(tmp_path).values()
    assert result.status is Status.FAILED
    assert "safetensors" in result.found
    assert result.advice == "mend what it names"


def test_a_model_without_a_tokenizer_is_told_of_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    results = examined(tmp_path)
    assert results["tokenizer"].status is Status.FAILED
    assert "tokenizer.json is missing" in results["tokenizer"].found
    assert results["weights"].status is Status.GOOD
