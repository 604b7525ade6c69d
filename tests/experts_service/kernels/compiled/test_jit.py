from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts_service.kernels.compiled import jit
from experts_service.kernels.compiled.jit import fma, kernel, narrow, widen
from tests.programs import said_by

pytestmark = pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported")


@kernel
def widened(bits: np.ndarray, values: np.ndarray) -> None:
    for index in range(len(bits)):
        values[index] = widen(bits[index])


@kernel
def narrowed(values: np.ndarray, bits: np.ndarray) -> None:
    for index in range(len(values)):
        bits[index] = narrow(values[index])


@kernel
def multiplied_and_added(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    for index in range(len(a)):
        c[index] = fma(a[index], b[index], c[index])


def test_every_bf16_widens_to_the_number_that_torch_has() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = np.empty(len(bits), np.float32)
    widened(bits, values)
    expected = torch.from_numpy(bits).view(torch.bfloat16).float()
    assert torch.equal(torch.from_numpy(values).view(torch.int32), expected.view(torch.int32))


def test_any_float_is_narrowed_as_torch_rounds_it() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000  # between two bf16: to the even one
    values = np.concatenate([random, halfway]).view(np.float32)
    bits = np.empty(len(values), np.uint16)
    narrowed(values, bits)
    ours, expected = torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(values).bfloat16()
    assert torch.equal(ours.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(ours[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_a_product_is_not_rounded_before_the_sum() -> None:
    a = np.array([1 + 2**-23], np.float32)
    c = np.array([-1 - 2**-22], np.float32)
    multiplied_and_added(a, a, c)
    assert c[0] == np.float32(2**-46)


def test_machine_code_lies_where_only_its_user_can_write(tmp_path: Path) -> None:
    program = "from experts_service.kernels.compiled import jit; import numba; print(numba.config.CACHE_DIR)"

    def cache_directory() -> Path:
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        )
        return Path(run.stdout.strip())

    directory = cache_directory()
    assert directory.is_relative_to(tmp_path)
    assert directory.stat().st_mode & 0o077 == 0
    directory.chmod(0o777)  # anyone might have left code there
    assert not cache_directory().is_relative_to(tmp_path)


def cache_directory(**environment: str) -> str:
    """What a process with this environment says."""
    program = "from experts_service.kernels.compiled import jit; print(jit.AVAILABLE, jit.cache_directory())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip()


def test_a_relative_cache_directory_is_ignored(tmp_path: Path) -> None:
    """As its standard says. Ray's processes run in directories of their own: each would have compiled for itself."""
    said = cache_directory(XDG_CACHE_HOME="cache", HOME=str(tmp_path))
    assert said.startswith(f"True {tmp_path}/.cache/manta/kernels/")


def test_a_numba_that_is_told_to_compile_nothing_is_as_good_as_none(tmp_path: Path) -> None:
    """With NUMBA_DISABLE_JIT=1 no process came up: what it leaves of kernels are functions of Python."""
    assert cache_directory(NUMBA_DISABLE_JIT="1", HOME=str(tmp_path)) == "False None"


@pytest.mark.parametrize("how", ["numba cannot be imported", "it is told to compile nothing"])
def test_what_serves_can_be_imported_without_compiled_code(tmp_path: Path, how: str) -> None:
    """No process of a model came up: modules asked for operations that only a compiler has."""
    environment = {"NUMBA_DISABLE_JIT": "1"}
    if how == "numba cannot be imported":
        (tmp_path / "numba.py").write_text("raise ImportError('hidden')\n")
        environment = {}
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import router_service.coordinator, router_service.assembly, experts_service.shard.shard",
        ],
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path]), "HOME": str(tmp_path), **environment},
        check=True,
        timeout=300,
    )


@pytest.mark.parametrize("broken", ["open", "flock"])
def test_where_nothing_can_be_locked_all_compile(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home on a disk of the network refused to lock, and that ended every start."""

    def refused(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    owner: Any = Path if broken == "open" else fcntl
    monkeypatch.setattr(owner, broken, refused)
    with jit.one_process("testing"):
        pass
    with pytest.raises(OSError, match="of the body"), jit.one_process("testing"):
        raise OSError("of the body")


def test_two_kernels_are_compiled_at_once_and_one_by_one_process_only(tmp_path: Path, monkeypatch: Any) -> None:
    """While one process compiled attention, shards waited for it to read what had been compiled for them long ago."""
    monkeypatch.setattr(jit, "_directory", tmp_path)
    names: list[str] = []
    one_process = jit.one_process

    def noted(doing: str) -> Any:
        names.append(doing)
        return one_process(doing)

    def first(task: Any) -> None:
        task[0] = 1

    def second(task: Any) -> None:
        task[0] = 2

    monkeypatch.setattr(jit, "one_process", noted)
    jit.compile_routine(first)
    jit.compile_routine(second)
    compiling = [name for name in names if name.startswith("compiling-")]
    assert [name.rpartition(".")[2] for name in compiling] == ["first", "second"]


def test_what_was_kept_and_is_cut_off_is_compiled_again(tmp_path: Path) -> None:
    """A machine went down while it wrote, and from then on no start came further than the broken file."""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}

    def count() -> str:
        return said_by("experts_service.count_compiled", environment=environment)

    assert count() == "10\n"
    for kind in ("*.nbc", "*.nbi"):
        (file,) = tmp_path.rglob(kind)
        file.write_bytes(file.read_bytes()[:10])
        assert count() == "10\n"
        assert len(file.read_bytes()) > 10, "and kept again"
