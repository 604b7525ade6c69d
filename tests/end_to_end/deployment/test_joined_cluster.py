"""`manta serve --address`: on a Ray cluster that somebody else started, and that goes on when Manta stops."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.demo_model import DIRECTORY
from tests.checkpoints import write_checkpoint
from tests.ports import free_port
from tests.programs import REPOSITORY, program
from tests.waiting import wait_for

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def foreign_ray():
    """A Ray head of its own, apart from the session's."""
    port = free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = ["start", "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=2", "--block"]
    process = subprocess.Popen(
        [BIN / "ray", *command, f"--temp-dir=/tmp/manta-{port}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert any("Ray runtime started" in line for line in process.stdout)
    yield f"127.0.0.1:{port}", environment
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    process.stdout.close()


def test_it_joins_serves_experts_locally_and_leaves(foreign_ray, tmp_path):
    address, environment = foreign_ray
    write_checkpoint(tmp_path / "tiny", vocab_size=2048)
    demo = DIRECTORY
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tiny" / name).write_bytes((demo / name).read_bytes())
    port, grpc_port = free_port(), free_port()
    config = tmp_path / "manta.yaml"
    config.write_text(
        f"models: [{{name: tiny, path: {tmp_path / 'tiny'}, engine: {{max_model_len: 256}}, experts: "
        f"{{transport: local}}}}]\ngateway: {{http_port: {port}, grpc_port: {grpc_port}}}\n"
    )
    process = subprocess.Popen(
        [BIN / "manta", "serve", "--config", config, "--address", address],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: process.poll() is not None or answers(port), 300, "the joined server")
        assert process.poll() is None, process.stdout.read()
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 5
        second = run_serve("--address", address, "--port", str(free_port()), environment=environment)
        assert second.returncode == 2
        assert "manta serve runs on this cluster already: process " in in_one_line(second)
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    status = subprocess.run(
        [BIN / "ray", "status", "--address", address],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert status.returncode == 0, "the cluster that we joined is gone"


def test_a_file_of_keys_that_a_node_has_not_is_told_at_once(foreign_ray, tmp_path):
    """The gateways there failed one after the other, each with a path that is right where Manta was started."""
    address, environment = foreign_ray
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'- {{id: alice, sha256: "{"0" * 64}"}}\n')
    with keys.open() as stream:
        number = fcntl.fcntl(stream, fcntl.F_DUPFD, 900)  # higher than those of a process of Ray
    try:
        file = f"/proc/self/fd/{number}"  # there is one in the process that we start, and in no other
        arguments = ("--address", address, "--api-keys-file", file, "--port", str(free_port()))
        ended = run_serve(*arguments, environment=environment, pass_fds=[number])
    finally:
        os.close(number)
    said = in_one_line(ended)
    assert ended.returncode == 2, said
    assert f"gateway.api_keys_file: {file} cannot be read on " in said
    assert "with --address it has to be on every node" in said


def test_what_runs_on_its_serve_already_stays_as_it_is(foreign_ray):
    """The ports that were asked for were left out without a word, and printed as if something listened there."""
    address, environment = foreign_ray
    port = free_port()
    with theirs(address, port, environment):
        elsewhere = run_serve("--address", address, "--port", str(free_port()), environment=environment)
        assert elsewhere.returncode == 2
        expected = f"Serve runs on this cluster already, and its ports cannot be changed: give --port {port}"
        assert expected in in_one_line(elsewhere)
        there = run_serve("--address", address, "--port", str(port), environment=environment)
        assert there.returncode == 2
        expected = (
            "Serve takes no gateway, whose routes begin at /, beside what it runs: Prefix / is being used by applic"
        )
        assert expected in in_one_line(there)
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).text == "theirs"


def test_the_cluster_of_another_server_is_not_joined(server):
    """It took that one's gateway over, and whichever ended first ended both."""
    ports = ("--port", server.url.rpartition(":")[2], "--grpc-port", server.grpc_address.rpartition(":")[2])
    ended = run_serve("--address", server.ray_address, *ports, environment=os.environ)
    said = in_one_line(ended)
    assert ended.returncode == 2, said
    named = re.search(r"manta serve runs on this cluster already: process (\d+) on ", said)
    assert named is not None, said
    assert int(named[1]) in [child.pid for child in psutil.Process(server.process.pid).children()]
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


@contextmanager
def theirs(address, port, environment):
    """Somebody else's application on the cluster."""
    command = program("cluster.start_serve", address, port)
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert any(line == "up\n" for line in process.stdout)
        yield
    finally:
        process.communicate(timeout=120)  # ends its input


def run_serve(*arguments, environment, pass_fds=()):
    """`manta serve` that is to end by itself."""
    command = [BIN / "manta", "serve", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, pass_fds=pass_fds, check=False
    )


def in_one_line(ended):
    """All of it as one line."""
    return " ".join((ended.stdout + ended.stderr).split())


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
