"""`manta fetch` on a local cache of the hub: every byte is verified, and who waits goes on only then."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.commands.fetch import run, verify
from cluster.demo_model import DIRECTORY
from cluster.errors import CheckpointError, ConfigError, SetupError
from tests.waiting import wait_for

MODEL, REVISION = "acme/demo", "5c79a376139be989ef1838f360bf4f1f256d7aec"
TIMEOUT_S = 240


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A model in the cache, as the hub's client leaves it: names that link to blobs, large ones under their SHA-256."""
    folder = tmp_path / "hub" / "models--acme--demo"
    snapshot = folder / "snapshots" / REVISION
    for name in ("blobs", "refs"):
        (folder / name).mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    for file in DIRECTORY.iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors"):
            content = file.read_bytes()
            digest = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
            blob = folder / "blobs" / digest(content).hexdigest()
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def _start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [Path(sys.executable).with_name("manta"), "fetch", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _fetch(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    process = _start(tmp_path, *arguments)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output + errors


def test_who_waits_goes_on_when_a_model_was_verified(tmp_path: Path, snapshot: Path) -> None:
    waiting = _start(tmp_path, "--wait", MODEL)
    assert waiting.stdout is not None
    assert "Waiting for acme/demo" in waiting.stdout.readline()
    time.sleep(1)
    assert waiting.poll() is None  # the files are there, and nobody has verified them
    code, output = _fetch(tmp_path, MODEL)
    assert code == 0, output
    assert "fingerprint" in output
    wait_for(lambda: waiting.poll() is not None, TIMEOUT_S, "the waiting command")
    assert waiting.returncode == 0
    waiting.communicate()
    code, output = _fetch(tmp_path, MODEL)
    assert (code, "was fetched and verified before" in output) == (0, True), output


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of this process, which has no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_who_waits_for_a_revision_is_not_told_of_another(
    cache: Path, snapshot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that another pod had fetched from main would have been taken for the one that was asked for."""
    run([MODEL], None, wait=False, timeout_s=0)
    wanted = f"{MODEL}@{REVISION}"
    with pytest.raises(SetupError, match=f"{wanted} was not fetched within 0 s"):
        run([wanted], None, wait=True, timeout_s=0)
    run([MODEL], REVISION, wait=False, timeout_s=0)
    assert str(snapshot) in capsys.readouterr().out
    run([wanted], None, wait=True, timeout_s=0)
    with pytest.raises(ConfigError, match="cannot be fetched from the hub"):
        run([f"{MODEL}@v9"], None, wait=False, timeout_s=0)


def test_two_may_write_one_note(cache: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wrote one draft; who came second found none, and failed with a stack."""
    replace = Path.replace

    def after_another(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        run([MODEL], None, wait=False, timeout_s=0)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", after_another)
    run([MODEL], None, wait=False, timeout_s=0)
    assert [file.suffix for file in (cache / ".manta").iterdir()] == [".json"]


def test_a_note_that_is_empty_is_none(cache: Path, snapshot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a machine that lost its power may leave it: each fetch then ended in a stack."""
    run([MODEL], None, wait=False, timeout_s=0)
    [note] = (cache / ".manta").iterdir()
    note.write_text("")
    run([MODEL], None, wait=False, timeout_s=0)
    assert "verified before" not in capsys.readouterr().out
    run([MODEL], None, wait=False, timeout_s=0)
    assert "verified before" in capsys.readouterr().out


def test_what_is_here_is_neither_fetched_nor_waited_for(cache: Path, tmp_path: Path) -> None:
    """The embedded model was a stack trace where there was no cache yet, and who waited for it did so for ever."""
    for model in ("demo", str(DIRECTORY)):
        for wait in (False, True):
            run([model], None, wait=wait, timeout_s=0)
    assert not cache.exists()
    with pytest.raises(ConfigError, match="only a model of the hub has revisions"):
        run(["demo"], "v1", wait=True, timeout_s=0)


def test_one_wrong_byte_is_found(tmp_path: Path, snapshot: Path) -> None:
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    code, output = _fetch(tmp_path, MODEL)
    assert code == 2
    assert "model.safetensors is damaged: its SHA-256 is" in output
    code, output = _fetch(tmp_path, "--wait", "--timeout", "0.1", MODEL)
    assert (code, "acme/demo was not fetched within 0.1 s" in output) == (2, True), output


def test_small_files_are_under_other_names(snapshot: Path) -> None:
    assert verify(snapshot) == (DIRECTORY / "model.safetensors").stat().st_size


def test_a_file_that_was_cut(snapshot: Path) -> None:
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(snapshot)
