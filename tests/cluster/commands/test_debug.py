"""`manta debug bundle`: what is in the file, that what is broken does not stop it, and that no secret is in it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.commands import debug
from cluster.commands.gateway_page import read_page
from cluster.errors import ConfigError, MantaError
from tests.programs import REPOSITORY


def contents(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive.getmembers()}  # type: ignore[union-attr]


def test_what_is_broken_is_said_and_the_rest_is_there(tmp_path: Path) -> None:
    def breaks() -> Iterator[debug.Part]:
        yield "half.txt", b"half"
        raise RuntimeError("the cluster is gone")

    file = tmp_path / "bundle.tar.gz"
    missing = debug.write(file, {"a": lambda: iter([("a.txt", b"one")]), "b": breaks, "c": lambda: iter(())})
    assert missing == {"b": "the cluster is gone", "c": "there is none here"}
    found = contents(file)
    assert found["manta-debug/a.txt"] == b"one"
    assert found["manta-debug/half.txt"] == b"half"
    assert b"not in it: b: the cluster is gone" in found["manta-debug/README.txt"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"mine cannot be written: File exists"):
        debug.write(file, {})
    assert file.read_text() == "mine"


def test_of_logs_the_ends_of_the_newest_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "LOG_TAIL_BYTES", 4)
    monkeypatch.setattr(debug, "MAX_LOGS", 2)
    (tmp_path / "serve").mkdir()
    for age, name in enumerate(("serve/new.log", "long.err", "old.log")):
        (tmp_path / name).write_text(f"begin {name[-7:-4]}\n{name[-4:]}")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "link.log").symlink_to("/etc/hostname")
    assert dict(debug.tails(tmp_path)) == {"logs/serve/new.log": b".log", "logs/long.err": b".err"}
    assert list(debug.tails(None)) == []


def test_a_log_that_goes_meanwhile_is_no_loss_of_the_others(tmp_path: Path) -> None:
    """Ray and Serve rotate theirs while a server runs, and none of those behind was in the bundle."""
    for age, name in enumerate(("first", "gone", "last")):
        (tmp_path / name).write_text("a line\n")
        os.utime(tmp_path / name, (age, age))
    found = debug.tails(tmp_path)
    assert next(found)[0] == "logs/first"
    (tmp_path / "gone").unlink()
    assert [name for name, _ in found] == ["logs/last"]


def test_a_tail_begins_with_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of a token was in the bundle: nothing before it said what it is."""
    monkeypatch.setattr(debug, "LOG_TAIL_BYTES", 20)
    (tmp_path / "a.log").write_text("Authorization: Bearer hunter2-hunter2\nanswered\n")
    assert dict(debug.tails(tmp_path)) == {"logs/a.log": b"answered\n"}


@pytest.mark.parametrize(
    "secret",
    [
        "https://me:hunter2-hunter2@collector/v1",
        "Authorization: Bearer hunter2-hunter2",
        "token=hf_hunter2hunter2hunter2",
        f"x-api-key: manta-{'hunter2' * 6}_",
    ],
)
def test_what_libraries_wrote_of_secrets_is_taken_out(tmp_path: Path, secret: str) -> None:
    file = tmp_path / "bundle.tar.gz"
    debug.write(file, {"logs": lambda: iter([("a.log", f"before {secret} after".encode())])})
    text = contents(file)["manta-debug/a.log"]
    assert b"hunter2" not in text
    assert text.startswith(b"before ")
    assert text.endswith(b" after")


def test_where_nothing_runs_there_is_a_bundle_all_the_same(tmp_path: Path) -> None:
    config = tmp_path / "manta.yaml"
    config.write_text("models: [{name: m, path: embedded:mixtral}]\n")
    places = ["--address", "127.0.0.1:1", "--url", "http://127.0.0.1:1", "--config", str(config)]
    command = [sys.executable, "-m", "cluster.cli", "debug", "bundle", str(tmp_path / "bundle.tar.gz"), *places]
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / "ray")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not in it: status: no Ray cluster answers at 127.0.0.1:1" in done.stdout
    assert "not in it: health: " in done.stdout
    found = contents(tmp_path / "bundle.tar.gz")
    assert json.loads(found["manta-debug/versions.json"])["packages"]["torch"]
    assert json.loads(found["manta-debug/config.json"])["models"][0]["name"] == "m"


def test_what_is_wrong_is_told_beside_what_is_missing(tmp_path: Path) -> None:
    wrong: list[str] = []

    def status() -> Iterator[debug.Part]:
        yield "status.json", b"{}"
        wrong.append("The proxy does not answer.")

    debug.write(tmp_path / "bundle.tar.gz", {"status": status}, wrong)
    readme = contents(tmp_path / "bundle.tar.gz")["manta-debug/README.txt"]
    assert b"wrong: The proxy does not answer." in readme


def test_a_process_that_is_stopped_is_known_by_its_state_and_has_a_stack() -> None:
    """Nothing in the bundle told a stopped shard from one that waits."""
    waits = "import sys, time; print(flush=True); time.sleep(600)"
    command = ["ray::Stands", "-c", waits, "--password=hunter2"]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            wrong: list[str] = []
            [(_, lines)] = list(debug._processes(wrong))
            assert f"ray::Stands is stopped (state T); `kill -CONT {process.pid}` lets it go on" in wrong
            [line] = [line.split() for line in lines.decode().splitlines() if line.split()[0] == str(process.pid)]
            assert (line[1], line[-1]) == ("T", "ray::Stands")
            assert b"hunter2" not in lines
            stack = dict(debug._stacks())[f"stacks/{process.pid}.txt"]
            assert b"hunter2" not in stack
            assert b"<module>" in stack or b"Permission" in stack or b"Error" in stack
        finally:
            process.kill()


def test_all_stacks_together_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of sixty shards, ten seconds for each that cannot be looked at were ten minutes."""
    monkeypatch.setattr(debug, "STACKS_TIMEOUT_S", 0.0)
    monkeypatch.setattr(debug, "_ours", lambda: iter([(psutil.Process(), "ray::Mine")]))
    with pytest.raises(MantaError, match="all that could be had in 0 s"):
        list(debug._stacks())


@pytest.mark.parametrize("content", [b"caf\xe9-token\n", b"to\x00ken\n", b"\xff\xfet\x00"])
def test_what_is_no_token_is_told_and_not_shown(tmp_path: Path, content: bytes) -> None:
    """What refuses a header shows it, and the token went into the message."""
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"token: its first line is no token, which is of ASCII's characters$"):
        read_page("127.0.0.1:1", "/metrics", file)
