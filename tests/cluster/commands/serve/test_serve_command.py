"""`manta serve` refuses what cannot work before it starts anything, in one line that says what to mend."""

import socket
import subprocess
import sys

import pytest

from cluster.commands.serve.command import did_not_start
from tests.checkpoints import write_checkpoint
from tests.haproxy import with_open_files
from tests.programs import said_by


def serve(*arguments, **options):
    """Exit code and standard error of a `manta serve` that is expected to end by itself; `options` are Popen's."""
    command = [sys.executable, "-m", "cluster.cli", "serve", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path)
    return tmp_path


def test_a_truncated_file_is_named(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, message = serve(checkpoint)
    assert code == 2
    assert "model.safetensors" in message


def test_a_directory_without_safetensors_is_refused_and_told_why(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    code, message = serve(checkpoint)
    assert code == 2
    assert "safetensors" in message


def test_a_missing_tokenizer_is_named_before_anything_is_started(checkpoint):
    """It was told when all weights had been loaded, and without its name."""
    code, message = serve(checkpoint)
    assert code == 2
    assert f"{checkpoint / 'tokenizer.json'} is missing" in message.replace("\n", "")


def test_neither_directory_nor_hub_id():
    code, message = serve("/nowhere/at/all")
    assert code == 2
    assert "/nowhere/at/all" in message


def test_model_and_config_together():
    assert serve("somewhere", "--config", "manta.yaml")[0] == 2


def test_a_revision_of_a_directory_or_of_nothing(checkpoint, tmp_path):
    code, message = serve(checkpoint, "--revision", "v1")
    assert (code, "only a model of the hub has revisions" in message) == (2, True), message
    code, message = serve("--revision", "v1")
    assert (code, "--revision is of a MODEL" in message) == (2, True), message
    config = tmp_path / "manta.yaml"
    config.write_text(f"models: [{{name: a, path: {checkpoint}, revision: v1}}]")
    code, message = serve("--config", config)
    assert (code, "only a model of the hub has revisions" in message) == (2, True), message


def test_a_wrong_configuration_names_the_key(tmp_path):
    config = tmp_path / "manta.yaml"
    config.write_text("models: [{name: a, path: b, experts: {group: auto}}]")
    code, message = serve("--config", config)
    assert code == 2
    assert "did you mean 'groups'" in message


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, message = serve("--port", taken.getsockname()[1])
    assert code == 2
    assert "gateway.http_port" in message


def test_a_host_that_others_reach_needs_keys(tmp_path):
    code, message = serve("--host", "0.0.0.0")
    assert code == 2
    assert "gateway.host" in message
    assert "--api-keys-file" in message
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {id: alice}")
    code, message = serve("--host", "0.0.0.0", "--api-keys-file", keys)
    assert code == 2
    assert "line 1: sha256: Field required" in message


def test_too_few_open_files_are_told_before_ray_starts():
    """HAProxy ended at once, with a raw alert in a log that nobody reads, and Serve waited for it."""
    code, message = serve(preexec_fn=with_open_files(1024))
    assert code == 2
    assert "a process may have 1024 open files, and HAProxy needs 10500" in message.replace("\n", " ")
    assert "Starting Ray" not in message


def test_a_wrong_list_of_groups_is_told_with_its_model_before_ray_starts(tmp_path):
    """Ray was started first, and with two models nothing said whose groups are meant."""
    config = tmp_path / "manta.yaml"
    config.write_text("models: [{name: a, path: demo}, {name: b, path: demo, experts: {groups: [[4, 5, 6, 7]]}}]")
    code, message = serve("--config", config)
    assert code == 2
    assert "models: 'b': experts.groups: experts 0, 1, 2, 3 are in no group" in " ".join(message.split())


def test_a_port_that_is_taken_on_a_cluster_that_is_joined_is_told():
    """It was told to look at the machine's load."""
    stack = "ray::ProxyActor.ready()\n  File …\nRuntimeError: Failed to bind to address '127.0.0.1:8000'."
    assert str(did_not_start(RuntimeError(stack))).startswith("cannot listen on 127.0.0.1:8000: another process")
    assert "look at its load" in str(did_not_start(TimeoutError("The actor never ran.")))


def test_a_signal_may_come_in_the_midst_of_anything():
    """An Event's lock is held for moments by who waits: SIGTERM just then, or twice at almost the same time, as systemd
    sends it to every process of a service, was waited upon for ever, and the supervisor killed the server with all its
    streams."""
    assert int(said_by("cluster.signalled_anywhere")) > 5
