"""What a server keeps on disk is its user's only, and goes when it ends."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cluster.commands.local_ray.private_files import haproxy_directory, haproxy_files, ray_directory, secure_token
from cluster.commands.local_ray.start import start_local_ray
from cluster.errors import SetupError
from experts_service.wire.address import _unnamed_directory
from tests.programs import REPOSITORY, program

SOCKET_LIMIT = 107  # of a path that can be bound


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go, short enough for sockets."""
    with TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        monkeypatch.setattr("tempfile.tempdir", directory)
        yield Path(directory)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def start(temporary: Path) -> subprocess.Popen[str]:
    """A server that prepares its files; it lives until its input ends."""
    return subprocess.Popen(
        program("cluster.prepare_server"),
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE")}
        | {"TMPDIR": str(temporary)},
    )


def folder(process: subprocess.Popen[str]) -> Path:
    """Its own, once it has prepared it."""
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_the_folders_of_ray_and_haproxy_are_closed_to_others(temporary: Path) -> None:
    """HAProxy's admin socket was everyone's, and Ray's session folder too: both lie in a folder that is closed now."""
    assert ray_directory() == temporary / f"manta-{os.geteuid()}" / "ray"
    assert mode(ray_directory().parent) == 0o700
    directory = haproxy_directory()
    assert mode(directory) == 0o700
    assert {Path(path) for path in haproxy_files(directory).values()} >= {directory / "cli", directory / "metrics"}


def test_sockets_have_room_where_user_id_and_process_id_are_long() -> None:
    """Serve adds a folder named by the node, and HAProxy binds `cli` as `cli.PID.tmp`."""
    directory = haproxy_directory()
    longer = len("1000680000") - len(str(os.geteuid()))  # a user as OpenShift has them
    for name in ("cli.4194304.tmp", "metrics"):
        assert len(str(directory / ("0" * 56) / name)) + longer <= SOCKET_LIMIT
    directory.rmdir()


def test_a_long_directory_for_temporary_files_is_not_taken(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("d" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert ray_directory() == Path(f"/tmp/manta-{os.geteuid()}/ray")


def test_a_name_that_another_user_took_costs_a_process_one_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its ports and files had one of its own in /tmp, for ever."""
    user = 2**31 + os.getpid()
    monkeypatch.setattr("os.geteuid", lambda: user)  # whose folder is ours: another's
    ours = ray_directory().parent
    try:
        assert ours.name != f"manta-{user}"
        assert haproxy_directory().parent == ours
    finally:
        _unnamed_directory.cache_clear()
        shutil.rmtree(ours)
        shutil.rmtree(f"/tmp/manta-{user}")


def test_ray_tmpdir_says_on_which_disk(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = temporary / "disk"  # is made, as Ray itself does
    monkeypatch.setenv("RAY_TMPDIR", str(disk))
    assert ray_directory() == disk / f"manta-{os.geteuid()}" / "ray"


def test_who_named_a_disk_is_told_that_it_is_not_taken(
    home: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gigabytes went to /tmp without a word."""

    def init(**options: object) -> None:
        raise Exception("it is enough")  # as Ray does where a raylet takes too long, which was a stack trace

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(temporary / ("d" * 60)))
    before = os.umask(0o077)
    try:
        with pytest.raises(SetupError, match="it is enough"):
            start_local_ray(1)
    finally:
        os.umask(before)
    assert f"Ray's files go to {temporary}/manta-{os.geteuid()}/ray: RAY_TMPDIR" in capsys.readouterr().err


def test_a_server_removes_its_folder_and_that_of_one_that_was_killed(temporary: Path) -> None:
    """Every server left its own in /tmp, with the sockets in it, for ever."""
    ended, killed, living = started = [start(temporary) for _ in range(3)]
    ended_in, killed_in, living_in = map(folder, started)
    (killed_in / "node").mkdir()
    (killed_in / "node" / "cli").touch()
    ended.communicate(timeout=180)
    assert not ended_in.exists()
    killed.kill()
    killed.communicate(timeout=180)
    assert killed_in.exists(), "nobody could"
    last = start(temporary)
    last_in = folder(last)
    assert not killed_in.exists()
    assert living_in.exists(), "it lives"
    assert last_in.exists()
    for process in (living, last):
        process.communicate(timeout=180)
    assert not list((temporary / f"manta-{os.geteuid()}").glob("ha-*"))


def test_rays_token_is_made_before_ray_makes_one_for_all_to_read(home: Path) -> None:
    assert secure_token() is None
    token = home / ".ray" / "auth_token"
    assert mode(token) == 0o600
    text = token.read_text()
    assert len(text) == 64
    assert secure_token() is None
    assert token.read_text() == text, "it is kept"
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_others_could_read_is_closed_and_told(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret-secret")
    token.chmod(0o644)
    warning = secure_token()
    assert warning is not None
    assert str(token) in warning
    assert "secret-secret" not in warning
    assert mode(token) == 0o600
    assert token.read_text() == "secret-secret"
    assert secure_token() is None


def test_a_token_file_that_the_user_named_is_warned_of_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = home / "mounted"
    token.write_text("secret-secret")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert f"chmod 600 {token}" in str(secure_token())
    assert mode(token) == 0o644
    assert not (home / ".ray").exists()


def test_a_token_file_whose_mode_cannot_be_changed_is_warned_of_only(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another owner, or on a read-only disk: `manta serve` did not start."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret-secret")
    token.chmod(0o644)

    def chmod(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", chmod)
    assert f"chmod 600 {token}" in str(secure_token())


def test_a_user_without_a_home_directory_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user is who has no name: it was a stack trace."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(SetupError, match="set HOME"):
        secure_token()


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "given")])
def test_no_token_file_is_made_where_none_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert secure_token() is None
    assert not (home / ".ray").exists()


def test_a_token_file_that_cannot_be_made_is_named(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(SetupError, match=r"auth_token, the file of Ray's token: "):
        secure_token()
