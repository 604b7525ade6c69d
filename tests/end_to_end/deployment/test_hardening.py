"""The server as Kubernetes runs it: no root, no capabilities, only /tmp and /dev/shm to write to; and who listens.

What it writes there, another user of the machine can neither read nor connect to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from experts_service.kernels.compiled.jit import cache_directory
from tests.hosts import Host, NotPossible, hosts
from tests.processes import proc_file
from tests.programs import REPOSITORY
from tests.waiting import wait_for

pytestmark = pytest.mark.root

USER = 10001  # that of the image
NOBODY = 65534
PROGRAMS = REPOSITORY / "tests" / "programs" / "end_to_end"
OVERLAY = REPOSITORY / "k8s" / "overlays" / "cpu-demo" / "manta.yaml"
START_TIMEOUT_S = 600

CONFINE = PROGRAMS / "confine.sh"

LOOK_AROUND = (sys.executable, "-c", (PROGRAMS / "look_around.py").read_text())
ASK_HAPROXY = (sys.executable, "-c", (PROGRAMS / "ask_haproxy.py").read_text())

# The table of docs/security.md: who listens on which ports, from the lowest to the highest, whether on loopback only.
NAMED = {
    "haproxy": ((8000, 8000, True), (9000, 9000, True), (8404, 8404, False), (9101, 9101, False)),
    "ray::ServeReplica:gateway:gateway": ((30000, 30100, True), (40000, 40100, True)),
    "ray::ProxyActor": ((8500, 8500, True), (9500, 9500, True)),
    "ray::DashboardAgent": ((52365, 52365, False),),
    "autoscaler/_private/monitor": ((44217, 44217, False),),
    "dashboard/dashboard": ((44227, 44227, False),),
}
# Ray's own processes and its driver; what starts with `ray::` is one too. Theirs are random, and guarded by its token,
RANDOM = {"gcs_server", "raylet", "manta", "workers/setup_worker"}
OPEN = ["ray::DashboardAgent"]  # but for that of one: Ray's metrics export


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket."""

    address: str
    port: int
    process_id: int

    @property
    def program(self) -> str:
        """What its process calls itself, without Ray's method names."""
        command = proc_file(self.process_id, "cmdline").replace("\0", " ").strip()
        if command.startswith("ray::"):
            return command.split()[0].split(".")[0]
        script = re.search(r"ray/(?:_private/)?(\S+)\.py|bin/(manta) serve", command)
        return script[1] or script[2] if script else Path(command.split()[0]).name

    def tells_anybody(self) -> bool:
        """Whether it answers a GET that brings no token, over HTTP."""
        host = "127.0.0.1" if self.address in ("*", "0.0.0.0", "[::]") else self.address
        answers = []
        for path in ("/", "/metrics"):
            with suppress(httpx.HTTPError):
                answers.append(httpx.get(f"http://{host}:{self.port}{path}", timeout=3).status_code)
        return 200 in answers

    @property
    def on_loopback(self) -> bool:
        return self.address in ("127.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "::1")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host of its own, on which `manta serve` runs confined."""
    try:
        with hosts(1) as (only,):
            yield only
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The process, once it answers."""
    log = tmp_path_factory.mktemp("hardening") / "log"
    manta = Path(sys.executable).with_name("manta")
    # Which half a minute of CPU goes into, and which has tests of its own.
    subprocess.run([sys.executable, "-m", "router_service.compile_kernels", "bfloat16"], cwd=REPOSITORY, check=True)
    compiled = cache_directory()
    with log.open("w") as out:
        process = host.start(
            ["unshare", "--mount", "sh", CONFINE, manta, "serve", "--config", OVERLAY],
            stdout=out, stderr=subprocess.STDOUT,
            env={
                **os.environ, "REPOSITORY": str(REPOSITORY), "USER_ID": str(USER),
                "KERNELS": str(compiled),
                "NEEDED": f"{REPOSITORY} {sys.prefix} {sys.base_prefix}",
            },
        )  # fmt: skip

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return host.run(lambda: httpx.get("http://127.0.0.1:8000/health", timeout=5)).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(healthy, START_TIMEOUT_S, "the confined server")
    except AssertionError as error:
        raise AssertionError(log.read_text()[-4000:]) from error
    yield process
    host.kill()


def test_it_serves_without_privileges_on_a_file_system_that_is_read_only(host: Host, server: Any) -> None:
    body = {"model": "mistral-small", "messages": [{"role": "user", "content": "What is the best French cheese?"}]}
    url = "http://127.0.0.1:8000/v1/chat/completions"
    answer = host.run(lambda: httpx.post(url, json=body, timeout=120))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]
    looked_at = 0
    for process_id in host.process_ids():
        try:
            status = Path(f"/proc/{process_id}/status").read_text()
            mounts = Path(f"/proc/{process_id}/mountinfo").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(USER)] * 4, status
        assert (fields["CapEff"], fields["CapBnd"], fields["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1"), status
        writable = {line.split()[4] for line in mounts if line.split()[5].startswith("rw")}
        assert {path for path in writable if not re.match(r"/(proc|sys|dev)", path)} == {"/tmp"}, writable
        looked_at += 1
    assert looked_at > 10, "the server, Ray's own processes and the replicas"


def as_user(host: Host, user: int, *command: str) -> list[str]:
    """The lines that this command writes as that user, who sees the files that the server sees."""
    [within, *_] = [pid for pid in host.process_ids() if "raylet" in proc_file(pid, "comm")]
    identity = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
    done = subprocess.run(
        ["nsenter", "--mount", "--target", str(within), "setpriv", *identity, *command],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_another_user_of_the_machine_can_open_nothing_that_it_wrote(host: Host, server: Any) -> None:
    """Ray's session folder was open to all, and so was its token, with which they could run code as the server."""
    url, looked_into = "http://127.0.0.1:8000/v1/models", ("/tmp", "/dev/shm")
    assert host.run(lambda: httpx.get(url, timeout=60)).status_code == 200
    own = as_user(host, USER, *LOOK_AROUND, *looked_into)
    for kind, path in (
        ("file", "/tmp/home/.ray/auth_token"),
        ("file", r".*/logs/gcs_server\.out"),
        ("file", r".*/haproxy\.cfg"),
        ("socket", r".*/sockets/raylet"),
        ("socket", r".*/(cli|admin\.sock)"),
        ("socket", r".*/metrics(\.sock)?"),
        ("socket", r".*/[0-9a-f]{12}\.sock"),  # of a lane
    ):
        assert any(re.fullmatch(f"{kind} {path}", line) for line in own), f"{path} is not where we looked: {own}"
    places = tuple(map(Path, (REPOSITORY, sys.prefix, sys.base_prefix)))  # may be in /tmp as well
    installed = tuple(f" {path}" for path in places)
    on_the_way = {f"folder {parent}" for path in places for parent in path.parents if parent.parent != Path("/")}
    lines = as_user(host, NOBODY, *LOOK_AROUND, *looked_into)
    seen = [line for line in lines if line not in on_the_way and not any(path in line for path in installed)]
    assert seen == ["folder /tmp", "folder /tmp/home", "folder /dev/shm"], seen


def test_another_user_cannot_tell_haproxy_to_send_requests_elsewhere(host: Host, server: Any) -> None:
    """By the admin socket, which was everyone's, `nobody` had alice's request sent to its own port, with her key."""
    listed = as_user(host, USER, *LOOK_AROUND, "/tmp")
    [path] = [line.split()[1] for line in listed if re.fullmatch(r"socket .*/(cli|admin\.sock)", line)]
    assert as_user(host, USER, *ASK_HAPROXY, path) == ["Name: HAProxy"]
    assert as_user(host, NOBODY, *ASK_HAPROXY, path) == ["Permission denied"]


def test_what_everyone_can_see_of_its_processes_holds_no_secret(host: Host, server: Any) -> None:
    """Command lines are everyone's to read, and sockets in the abstract name space everyone's to connect to."""
    token = as_user(host, USER, "cat", "/tmp/home/.ray/auth_token")[0]
    secret = as_user(host, USER, "cat", "/tmp/home/.manta/lane_secret")[0]
    commands = [proc_file(pid, "cmdline") for pid in host.process_ids()]
    assert len(commands) > 10
    assert not [command for command in commands if token in command or secret in command]
    sockets = host.run(lambda: Path("/proc/thread-self/net/unix").read_text())
    assert "/sockets/raylet" in sockets, "those of this host"
    assert "@" not in sockets, sockets


def test_only_the_ports_of_the_readme_listen(host: Host, server: Any) -> None:
    lines = subprocess.run(
        ["ip", "netns", "exec", host.name, "ss", "--no-header", "--listening", "--tcp", "--numeric", "--processes"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    listeners = []
    for line in lines:
        address, port = line.split()[3].rsplit(":", 1)
        for process_id in set(re.findall(r"pid=(\d+)", line)):
            listeners.append(Listener(address, int(port), int(process_id)))
    print(*sorted({f"{one.program} {one.address}:{one.port}" for one in listeners}), sep="\n")
    for program, ports in NAMED.items():
        for lowest, highest, loopback in ports:
            found = [one for one in listeners if one.program == program and lowest <= one.port <= highest]
            assert found, f"{program} does not listen on {lowest}"
            assert not loopback or all(one.on_loopback for one in found), found
    single = {lowest for ports in NAMED.values() for lowest, highest, _ in ports if lowest == highest}
    random = []
    for one in listeners:
        if not any(lowest <= one.port <= highest for lowest, highest, _ in NAMED.get(one.program, ())):
            assert one.port not in single, f"{one.program} listens on {one.port}"
            assert one.program in RANDOM or one.program.startswith("ray::"), f"{one.program} listens on {one.port}"
            random.append(one)
    # That they are guarded was taken for granted, so one that is not was missing from the table.
    assert host.run(lambda: [one.program for one in random if one.tells_anybody()]) == OPEN
    table = (REPOSITORY / "docs" / "security.md").read_text().partition("## Ports")[2].partition("\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith("| random | Ray's metrics export")]
    assert all(re.search(rf"\b{port}\b", table) for port in single)
