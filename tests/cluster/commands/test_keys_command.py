"""`manta keys new` shows a key once, and an entry that fits it."""

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
    with pytest.raises(ConfigError, match=r"keys.yaml, line 3: id: the same as in line 1"):
        CliRunner().invoke(app, ["keys", "new", "alice", "--file", str(file)], catch_exceptions=False)
    assert file.read_text() == before
    file.write_text("[{]")
    with pytest.raises(ConfigError, match=r"keys.yaml"):
        CliRunner().invoke(app, ["keys", "new", "carol", "--file", str(file)], catch_exceptions=False)


def test_an_id_that_logs_could_not_show_is_refused():
    assert CliRunner().invoke(app, ["keys", "new", "al ice"]).exit_code == 2
