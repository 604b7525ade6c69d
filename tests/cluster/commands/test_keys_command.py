"""`manta keys new` shows a key once, and an entry that fits it."""

from typer.testing import CliRunner

from cluster.cli import app
from gateway.admission.api_keys import ApiKeyFile


def test_the_entry_opens_for_the_key(tmp_path):
    result = CliRunner().invoke(app, ["keys", "new", "alice"])
    assert result.exit_code == 0
    [key] = [word for word in result.output.split() if word.startswith("manta-")]
    file = tmp_path / "keys.yaml"
    file.write_text(next(line for line in result.output.splitlines() if line.startswith("- ")))
    assert key not in file.read_text()
    assert ApiKeyFile(file).find(key).id == "alice"


def test_an_id_that_logs_could_not_show_is_refused():
    assert CliRunner().invoke(app, ["keys", "new", "al ice"]).exit_code == 2
