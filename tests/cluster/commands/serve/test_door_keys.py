"""The key of a server that was given no file of keys: given, made, or none."""

import json
import os
import stat
from pathlib import Path

import pytest

from cluster.commands.serve.door_keys import KEY, MAKE, with_key
from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from gateway.admission.api_keys import digest, read_api_keys

OPEN, CLOSED = GatewayConfig(host="0.0.0.0"), GatewayConfig()


def file_of(gateway: GatewayConfig) -> Path:
    assert gateway.api_keys_file is not None
    return Path(gateway.api_keys_file)


@pytest.mark.parametrize("make", [None, "", "0"])
def test_without_the_variables_nothing_changes(make: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.delenv(MAKE, raising=False)
    if make is not None:
        monkeypatch.setenv(MAKE, make)
    for gateway in (OPEN, CLOSED):
        with with_key(gateway) as (same, key):
            assert (same, key) == (gateway, None)


def test_open_doors_get_a_key_of_their_own_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAKE, "1")
    keys = []
    for _ in range(2):
        with with_key(OPEN) as (gateway, key):
            assert key is not None
            file = file_of(gateway)
            assert [one.sha256 for one in read_api_keys(file)] == [digest(key)]
            assert key not in file.read_text()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert not file.parent.exists(), "it goes with the server"
        keys.append(key)
    assert keys[0] != keys[1]


def test_doors_on_loopback_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAKE, "1")
    with with_key(CLOSED) as (gateway, key):
        assert (gateway.api_keys_file, key) == (None, None)


@pytest.mark.parametrize("gateway", [OPEN, CLOSED], ids=lambda one: one.host)
def test_a_given_key_is_used_not_shown_and_not_handed_on(
    gateway: GatewayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAKE, "1")
    monkeypatch.setenv(KEY, "a-key-of-somebody\n")  # as of a file's only line
    with with_key(gateway) as (with_file, shown):
        assert shown is None
        assert [one.sha256 for one in read_api_keys(file_of(with_file))] == [digest("a-key-of-somebody")]
        assert KEY not in os.environ


def test_a_key_that_can_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(ConfigError, match="16 characters"), with_key(OPEN):
        pass


def test_a_file_of_keys_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(MAKE, "1")
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"id": "a", "sha256": digest("x")}]))
    given = GatewayConfig(host="0.0.0.0", api_keys_file=file)
    with with_key(given) as (gateway, key):
        assert (gateway, key) == (given, None)
