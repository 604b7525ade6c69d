"""The file of API keys: what it may hold, and that changes of it are followed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from gateway import api_keys
from gateway.api_keys import ApiKeyFile, digest, new_key, read_api_keys


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
        ("{", "line"),
        ("", "a list"),
        ("keys: []", "a list"),
        ("- a", "entry 0"),
        ("- {id: a}", "0.sha256"),
        ("- {id: a, sha256: short}", "0.sha256"),
        ("- {id: 'a b', sha256: " + "0" * 64 + "}", "0.id"),
        ("- {id: a, sha256: '" + "0" * 64 + "', requests_per_minute: 0}", "0.requests_per_minute"),
        ("- {id: a, sha256: '" + "0" * 64 + "', rate: 1}", "0.rate"),
        ("- {id: a, sha256: '" + "0" * 64 + "'}\n- {id: a, sha256: '" + "1" * 64 + "'}", "entry 1.id"),
        ("- {id: a, sha256: '" + "0" * 64 + "'}\n- {id: b, sha256: '" + "0" * 64 + "'}", "entry 1.sha256"),
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
    assert known.find("old") is None
    assert known.find("new") is not None
    file.write_text("- {id: alice")
    assert known.find("new") is not None
    assert known.find("new") is not None
    os.remove(file)
    assert known.find("new") is not None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the API keys stay as they were"
    ] * 2
    write(file)
    assert known.find("new") is None, "an empty list withdraws every key"
    write(file, entry("newest"))
    assert known.find("newest") is not None


def test_a_change_is_seen_after_the_interval_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, entry("old"))
    known = ApiKeyFile(file)
    write(file, entry("new"))
    monkeypatch.setattr(api_keys, "MAX_AGE_S", 1000.0)
    assert known.find("old") is not None
    monkeypatch.setattr(api_keys, "MAX_AGE_S", 0.0)
    assert known.find("old") is None


def test_new_keys_differ() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 40 and key.startswith("manta-") for key in keys)
