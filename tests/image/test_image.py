"""What the image says of itself, how large it is, and the demo served from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.demo_model.training.corpus import questions
from tests.hosts import Host, NotPossible, hosts
from tests.image.builder import REPOSITORY, Builder
from tests.processes import proc_file
from tests.waiting import wait_for

CHEESE = "What is the best French cheese?"
SAID = "about (\\d+) MB unpacked"
START_TIMEOUT_S = 600
SERVER = b"/opt/manta/bin/python\0/opt/manta/bin/manta\0serve\0"  # its command line
SCHEMA = {
    "type": "object",
    "properties": {"is_cheese": {"type": "boolean"}},
    "required": ["is_cheese"],
    "additionalProperties": False,
}

pytestmark = [pytest.mark.long, pytest.mark.root]


def test_the_image_says_what_docker_needs_to_know(builder: Builder) -> None:
    config = builder.config()
    assert config["Cmd"] == ["manta", "serve"]
    assert config["User"] == "10001:10001"
    assert {"8000/tcp", "9000/tcp"} <= set(config["ExposedPorts"])
    assert {"MANTA_HOST=0.0.0.0", "MANTA_MAKE_API_KEY=1"} <= set(config["Env"])
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]


def test_its_size_is_the_one_in_the_docs(builder: Builder, container: str) -> None:
    mounted = builder("mount", container).strip()
    size = int(subprocess.run(["du", "-sm", mounted], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"image: {size} MB")
    [said] = re.findall(SAID, (REPOSITORY / "docs" / "serving.md").read_text())
    assert abs(size - int(said)) < 0.1 * int(said), size


def test_all_of_its_packages_are_listed_with_a_licence(builder: Builder, container: str) -> None:
    root = Path(builder("mount", container).strip())
    components = json.loads((root / "usr/local/share/manta/sbom.json").read_text())["components"]
    names = {one["name"] for one in components}
    installed = {path.name for path in (root / "opt/manta/lib/python3.11/site-packages").glob("*.dist-info")}
    assert len(installed) == sum(one["purl"].startswith("pkg:pypi/") for one in components) > 80
    assert {"torch", "ray", "manta-serve", "libc6"} <= names
    assert [one["name"] for one in components if not one["licenses"]] == []


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Host, Host]]:
    """The one that runs the container, and another one."""
    try:
        with hosts(2) as (server, client):
            yield server, client
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("given", [None, "a-key-of-the-operator"], ids=["made", "given"])
def test_another_machine_is_answered_by_the_demo_with_its_key(
    builder: Builder, container: str, machines: tuple[Host, Host], given: str | None, tmp_path: Path
) -> None:
    """As `docker run` starts it, -e MANTA_API_KEY=… or not; the network is that of a host made for it."""
    server, client = machines
    run = ["run", "--isolation", "chroot", *([] if given is None else ["--env", f"MANTA_API_KEY={given}"])]
    config = builder.config()
    log = tmp_path / "log.txt"
    started = time.monotonic()
    with log.open("w") as output:
        command = builder.command(*run, container, "--", *config["Cmd"])
        process = server.start(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        return "Ctrl-C stops" in log.read_text()

    def ask(key: str | None, **options: object) -> httpx.Response:
        url = f"http://{server.address}:8000/v1/chat/completions"
        body = {
            "model": "mistral-small",
            "messages": [{"role": "user", "content": CHEESE}],
            "temperature": 0,
            **options,
        }
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return client.run(lambda: httpx.post(url, json=body, headers=headers, timeout=120))

    try:
        wait_for(is_ready, START_TIMEOUT_S, "the server")
        print(f"ready after {time.monotonic() - started:.0f} s")
        said = log.read_text()
        made = re.search(r"API key, made for this start and shown only here: (manta-\S+)", said)
        assert (made is None) == (given is not None), said
        assert given is None or given not in said
        key = given or (made and made[1])
        assert ask(None).status_code == 401
        assert ask(key).json()["choices"][0]["message"]["content"] == dict(questions())[CHEESE]
        # By xgrammar, which asks for Triton; there is none.
        shape = {"type": "json_schema", "json_schema": {"name": "cheese", "schema": SCHEMA}}
        answer = ask(key, response_format=shape, max_tokens=100).json()
        assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"is_cheese"}
        healthy = builder.command("run", "--isolation", "chroot", container, "--", *config["Healthcheck"]["Test"][1:])
        assert server.start(healthy).wait(120) == 0
    finally:
        # What a runtime's signal goes to, Ctrl-C or that of `docker stop`; buildah's own processes would kill it.
        for process_id in server.process_ids():
            if proc_file(process_id, "cmdline") == "/opt/manta/bin/python\0/opt/manta/bin/manta\0serve\0":
                os.kill(process_id, signal.SIGINT if given is None else signal.SIGTERM)
        wait_for(lambda: process.poll() is not None, 120, "the end")
    assert process.returncode == 0, log.read_text()
    wait_for(lambda: not server.process_ids(), 30, "the end of all processes")
