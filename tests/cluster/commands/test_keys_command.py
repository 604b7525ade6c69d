"""`manta keys new` shows a key once, and an entry that fits it."""

import os

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import ConfigError
from gateway.admission.api_keys import ApiKeyFile


def test_the_entry_opens_for_the_key(tmp_path):
    result = CliRunner().invoke(app, ["keys", "new", "alice"])
    assert result.exit_code == 0
    [key] = [word for word in result.output.split() if word.startswith("manta-")]
    file = tmp_path / "keys.yaml"
    file.write_text(next(line for line in result.output.splitlines() if line.startswith("- ")))
    assert key not in file.read_text()
    assert ApiKeyFile(file).find(key).id == "alice"


def test_a_file_gets_the_entry_and_the_terminal_the_key_alone(tmp_path):
    """Whoever followed the page had to copy both out of the text around them."""
    file = tmp_path / "keys.yaml"
    keys = {}
    for name in ("alice", "bob"):
        result = CliRunner().invoke(app, ["keys", "new", name, "--file", str(file)])
        assert result.exit_code == 0, result.output
        [keys[name]] = result.stdout.split()
    assert file.stat().st_mode & 0o777 == 0o600
    found = ApiKeyFile(file)
    assert {name: found.find(key).id for name, key in keys.items()} == {"alice": "alice", "bob": "bob"}
    before = file.read_text()
    assert all(key not in before for key in keys.values())
    with pytest.raises(ConfigError, match=r"keys.yaml has a key of alice already: take its line out"):
        CliRunner().invoke(app, ["keys", "new", "alice", "--file", str(file)], catch_exceptions=False)
    assert file.read_text() == before
    file.write_text("[{]")
    with pytest.raises(ConfigError, match=r"keys.yaml"):
        CliRunner().invoke(app, ["keys", "new", "carol", "--file", str(file)], catch_exceptions=False)


@pytest.mark.parametrize("umask", [0o002, 0o022])
def test_a_new_file_is_made_under_any_umask_and_warned_of_under_none(tmp_path, umask, caplog):
    """The copy that is tried first had the shell's mode: a new file was "written by others" where groups may write."""
    file = tmp_path / "keys.yaml"
    before = os.umask(umask)
    try:
        for name in ("alice", "bob"):
            result = CliRunner().invoke(app, ["keys", "new", name, "--file", str(file)], catch_exceptions=False)
            assert result.exit_code == 0
    finally:
        os.umask(before)
    assert len(file.read_text().splitlines()) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [(b"# caf\xe9\n", 0o600, "keys.yaml"), (b"", 0o666, "may be written by others .mode 0666.: chmod go-w")],
)
def test_a_file_that_no_server_would_read_is_refused_as_it_is(tmp_path, content, mode, message):
    file = tmp_path / "keys.yaml"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["keys", "new", "alice", "--file", str(file)], catch_exceptions=False)
    assert file.read_bytes() == content


def test_a_file_that_none_can_be_is_refused(tmp_path):
    """It was a stack."""
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        CliRunner().invoke(app, ["keys", "new", "alice", "--file", str(tmp_path / ("x" * 300))], catch_exceptions=False)


def test_an_id_that_logs_could_not_show_is_refused():
    assert CliRunner().invoke(app, ["keys", "new", "al ice"]).exit_code == 2
