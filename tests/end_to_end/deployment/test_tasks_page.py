"""docs/tasks.md, followed by somebody who reads nothing else: each command of it, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.page_commands import blocks, changed
from tests.ports import free_port
from tests.steady_streams import Seen, SteadyStreams
from tests.waiting import wait_for

pytestmark = pytest.mark.long
BIN = Path(sys.executable).parent


class Reader:
    """Somebody at a terminal, on a machine where the ports of the page may be taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: subprocess.Popen[str] | None = None
        self.variables: dict[str, str] = {}
        self.log = folder / "server.log"

    def types(self, text: str) -> str:
        """Standard output of a block, which succeeds; variables that it sets are there for the next."""
        script = f"set -e\n{text.replace(':8000', f':{self.port}')}\n"
        environment = {**os.environ, **self.variables, "PATH": f"{BIN}:{os.environ['PATH']}"}
        script += "\ndeclare -p ID > variables 2>/dev/null || true\n"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}\n{self.log.read_text()[-3000:]}"
        if found := re.search(r'ID="(.*)"', (self.folder / "variables").read_text()):
            self.variables["ID"] = found[1]
        return done.stdout

    def serves(self, text: str) -> None:
        command = [*text.split(), "--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        with self.log.open("w") as output:
            self.server = subprocess.Popen(
                [BIN / command[0], *command[1:]], cwd=self.folder, stdout=output, stderr=subprocess.STDOUT, text=True
            )
        wait_for(lambda: self.server.poll() is not None or self.is_up(), 600, "the server")  # type: ignore[union-attr]
        assert self.server.poll() is None, self.log.read_text()
        wait_for(lambda: "Ctrl-C stops" in self.log.read_text(), 30, "the announcement")
        [self.variables["RAY_ADDRESS"]] = re.findall(r"Ray +(\S+:\d+)", self.log.read_text())

    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=30).status_code == 200
        except httpx.TransportError:
            return False

    def streams(self) -> SteadyStreams:
        key = (self.folder / "alice.key").read_text().strip()
        prompts = ["Once", "What is a good cheese?", "The dragon in the village"]
        return SteadyStreams(self.url, "small", prompts, 40, {"Authorization": f"Bearer {key}"})


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    one = Reader(tmp_path)
    yield one
    if one.server is not None:
        one.server.send_signal(signal.SIGINT)
        assert one.server.wait(120) == 0


def test_the_five_tasks(reader: Reader) -> None:
    config = reader.folder / "manta.yaml"
    said: dict[str, str] = {}  # of the blocks that a section ends with
    applied: list[Seen] = []
    for block in blocks("tasks.md"):
        print(f"line {block.line}: {block.text}", flush=True)
        if block.kind == "yaml":
            config.write_text(block.text)
        elif block.kind == "diff":
            config.write_text(changed(config.read_text(), block.text))
        elif block.text.startswith("manta serve"):
            reader.serves(block.text)
        elif block.text.startswith("manta apply"):
            before, streams = processes(), reader.streams()
            streams.learn()
            with streams.running() as seen:
                said[f"apply {len(applied)}"] = reader.types(block.text)
                time.sleep(1)
            assert seen.failures == []
            assert seen.num_complete > 0
            if not applied:
                assert seen.num_wrong == 0
                assert before < processes(), "one more, and nothing restarts"
            else:
                old = streams.answers
                streams.learn()
                assert old != streams.answers, "other weights say other things"
                assert seen.others <= streams.answers, "a stream is of one version"
            applied.append(seen)
        else:
            said.setdefault(block.text.split()[0], "")
            said[block.text.split()[0]] += reader.types(block.text)
    assert len(applied) == 3
    assert said["python"].startswith("['small', 'tiny']"), "the openai client"
    assert said["sed"].strip() == "401", "a key that was taken away"
    assert "small-v1: numbers of replicas change\n" in said["apply 0"]
    assert re.search(r"^tiny-\w{8}: stays as it is$", said["apply 0"], re.MULTILINE)
    assert "small-v2: starts" in said["apply 1"]
    assert "small-v1: ends its streams and goes" in said["apply 1"]
    assert "small-v1: starts" in said["apply 2"]
    assert "small-v2: ends its streams and goes" in said["apply 2"]
    counted = sorted(re.findall(r'^ *(\d+) "(\w+)":"', said["timeout"], re.MULTILINE), key=lambda one: one[1])
    assert [name for _, name in counted] == ["finish_reason", "system_fingerprint"], "one version and one end"
    assert counted[0][0] == "1"
    assert "time_to_first_token_s" in said["grep"]
    assert "expert-0" in said["kill"], "the status and the health behind it name it"


def processes() -> set[int]:
    """Those that have a model of the page, by id."""
    found = subprocess.run(["pgrep", "-f", r"^ray::ServeReplica:(small|tiny)-"], capture_output=True, text=True)
    return {int(one) for one in found.stdout.split()}
