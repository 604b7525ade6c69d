"""The file of API keys: what it may hold, and that changes of it are followed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from gateway.admission import api_keys
from gateway.admission.api_keys import ApiKeyFile, digest, new_key, read_api_keys
from tests.waiting import wait_for

ZEROS = "0" * 64
BROKEN = (
    b"- {id: alice, # mistake",
    b'- {id: alice, sha256: !!int "mistake"}',
    b"- {id: alice, sha256: 2026-99-99} # mistake",
    b"[" * 5000,
    b"- {id: alice, sha256: '" + b"1" * 64 + b"', tokens_per_minute: 1" + b"0" * 400 + b"}",
    b"- {id: \xff\xfe, mistake: 1}",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MAX_AGE_S", 0.0)


def entry(key: str, **fields: object) -> dict[str, object]:
    return {"id": "alice", "sha256": digest(key), **fields}


def write(file: Path, *entries: dict[str, object]) -> None:
    """As an editor does: a new file in the old one's place."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(entries))
    fresh.rename(file)


def test_json_and_yaml_are_read_alike(file: Path) -> None:
    write(file, entry("one", requests_per_minute=3), entry("two", id="bob"))
    as_json = read_api_keys(file)
    file.write_text(
        f'- {{id: alice, sha256: "{digest("one").upper()}", requests_per_minute: 3}}\n'
        f'- id: bob\n  sha256: "{digest("two")}"\n'
    )
    assert read_api_keys(file) == as_json
    assert (as_json[0].requests_per_minute, as_json[1].requests_per_minute) == (3, None)


def test_each_key_is_found_and_no_other(file: Path) -> None:
    keys = {f"key-{i}": new_key() for i in range(5)}
    write(file, *(entry(key, id=name) for name, key in keys.items()))
    known = ApiKeyFile(file)
    for name, key in keys.items():
        found = known.find(key)
        assert found is not None
        assert found.id == name
    for wrong in ("", "x", digest(keys["key-0"]), keys["key-0"][:-1], keys["key-0"] + " ", "ключ", "\udcff"):
        assert known.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 2: neither YAML nor JSON"),
        ("", "a list"),
        ("keys: []", "a list"),
        ("- a", "line 1: entry: "),
        ("\n- {id: a}", "line 2: sha256: Field required"),
        ("- id: a\n  sha256: short", "line 2: sha256: expected 64 hexadecimal digits, as `manta keys new` writes them"),
        ("- {id: 'a b', sha256: " + ZEROS + "}", "line 1: id: "),
        ("- {id: a, sha256: '" + ZEROS + "', requests_per_minute: 0}", "line 1: requests_per_minute: "),
        ("- {id: a, sha256: '" + ZEROS + "', tokens_per_minute: 1" + "0" * 400 + "}", "line 1: tokens_per_minute: "),
        ("- {id: a, sha256: '" + ZEROS + "', max_concurrency: 1" + "0" * 5000 + "}", "line 1: a value that is not"),
        ("- {id: a, sha256: '" + ZEROS + "', mistake: 1}", "line 1: an unknown field; known are id, sha256"),
        ("- {id: a, sha256: '" + ZEROS + "'}\n- {id: a, sha256: '" + "1" * 64 + "'}", "line 2: id: .* line 1"),
        ("- {id: a, sha256: '" + ZEROS + "'}\n- {id: b, sha256: '" + ZEROS + "'}", "line 2: sha256: .* line 1"),
        ("- id: a\n  sha256: '" + ZEROS + "'\n  sha256: '" + ZEROS + "'", "line 3: a key for the second time"),
        ("- {id: a, sha256: !!int 'mistake'}", "line 1: a value that is not what its tag says"),
        ("- {id: a, sha256: !!bool 'mistake'}", "line 1: a value that is not what its tag says"),
        ("- {id: a, sha256: !!timestamp 'mistake'}", "line 1: a value that is not what its tag says"),
        ("- {id: a, sha256: !!float 'mistake'}", "line 1: a value that is not what its tag says"),
        ("- {id: a, sha256: !mistake 1}", "line 1: neither YAML nor JSON"),
        ("- id: a\n  sha256: 2026-13-45", "line 2: a value that is not what its tag says"),
        ("[" * 100_000, "line 1: nested more than"),
        ("- " * 3_000 + "x", "line 1: nested more than"),
        ("{a: " * 3_000, "line 1: nested more than"),
        ("- &mistake {id: a}\n- *mistake", "line 2: an alias"),
        ("- *mistake", "line 1: an alias"),
        ("- id: \x07mistake", "line 1: a character that YAML does not allow"),
        ("- {id: a}\n" * 110_000, "is longer than"),
    ],
)
def test_a_wrong_file_is_refused_and_what_stands_there_is_not_shown(file: Path, text: str, words: str) -> None:
    file.write_text(text + "\n# manta-a-key-left-here-by-mistake")
    with pytest.raises(ConfigError, match=words) as refused:
        read_api_keys(file)
    assert str(file) in str(refused.value)
    assert "mistake" not in str(refused.value)


def test_a_missing_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeyFile(file)


@pytest.mark.usefixtures("no_waiting")
def test_changes_are_followed_and_broken_ones_are_not(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(file, entry("old"))
    known = ApiKeyFile(file)
    write(file, entry("new"))
    wait_for(lambda: known.find("old") is None, 10, "the change")
    assert known.find("new") is not None
    for broken in BROKEN:
        caplog.clear()
        file.write_bytes(broken)
        wait_for(lambda: known.find("new") is not None and caplog.records, 10, "the error in the log")
        [said] = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"the API keys stay as they were: {file}, line "), said
        assert "mistake" not in said
        assert caplog.records[0].exc_info is None
    caplog.clear()
    os.remove(file)
    wait_for(lambda: known.find("new") is not None and caplog.records, 10, "the error in the log")
    write(file)
    wait_for(lambda: known.find("new") is None, 10, "an empty list, which withdraws every key")
    write(file, entry("newest"))
    wait_for(lambda: known.find("newest") is not None, 10, "the newest key")


def test_a_change_is_seen_after_the_interval_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, entry("old"))
    known = ApiKeyFile(file)
    write(file, entry("new"))
    monkeypatch.setattr(api_keys, "MAX_AGE_S", 1000.0)
    assert known.find("old") is not None
    monkeypatch.setattr(api_keys, "MAX_AGE_S", 0.0)
    wait_for(lambda: known.find("old") is None, 10, "the change")


@pytest.mark.usefixtures("no_waiting")
def test_a_long_file_does_not_keep_who_asks(file: Path) -> None:
    """The first request after the change read it, on the event loop: seconds for some thousand keys."""
    write(file, entry("old"))
    known = ApiKeyFile(file)
    write(file, entry("new"), *({"id": f"key-{i}", "sha256": digest(str(i))} for i in range(4000)))
    everything, own = time.process_time(), time.thread_time()
    assert known.find("old") is not None, "it is being read"
    took_s = time.thread_time() - own
    wait_for(lambda: known.find("new") is not None, 60, "the change")
    assert took_s < (time.process_time() - everything) / 5, "of the CPU time until the change is known"


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    """Who may write it may give themselves a key. It passed without a word."""
    write(file, entry("one"))
    file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"may be written by others \(mode {mode:04o}\): chmod go-w"):
        ApiKeyFile(file)


@pytest.mark.usefixtures("no_waiting")
def test_one_that_others_may_write_from_now_on_is_not_read_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(file, entry("old"))
    known = ApiKeyFile(file)
    caplog.clear()
    file.chmod(0o666)
    file.write_text(json.dumps([entry("new")]))
    wait_for(lambda: known.find("old") is not None and caplog.records, 10, "the error in the log")
    assert "may be written by others" in caplog.records[0].getMessage()
    assert known.find("new") is None
    file.chmod(0o600)
    wait_for(lambda: known.find("new") is not None, 10, "the file that is closed again")


def test_one_that_all_may_read_is_warned_of_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Kubernetes mounts a Secret that names no mode. One that a group may read is how ours are mounted."""
    write(file, entry("one"))
    file.chmod(0o640)
    ApiKeyFile(file)
    assert not caplog.records
    file.chmod(0o644)
    ApiKeyFile(file)
    ApiKeyFile(file)
    [said] = [record.getMessage() for record in caplog.records]
    assert said == f"{file} may be read by every user of this machine (mode 0644): chmod o-r {file}"


def test_a_pipe_is_refused_and_not_waited_for(file: Path) -> None:
    os.mkfifo(file, 0o600)
    with pytest.raises(ConfigError, match="is not a file"):
        ApiKeyFile(file)


def test_new_keys_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 40 and key.startswith("manta-") for key in keys)
