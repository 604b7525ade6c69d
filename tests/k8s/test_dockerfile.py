"""The Dockerfile and the locks: what can be said of them without a build. tests/image builds the image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from cluster.cli import app
from cluster.kubernetes.containers import LAUNCHER
from cluster.kubernetes.names import CONTAINER_USER_HOME, USER
from tests.k8s.overlays import REPOSITORY

LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
STAGES = ("cpu", "cuda")
PACKAGES = ("cluster", "experts_service", "gateway", "router_service")
NOT_SERVED = "cluster/demo_model/training"  # how the demo's models were made


def _instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, arguments), with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / "Dockerfile").read_text())
    found, stage = [], ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            stage = arguments.rsplit(" AS ", 1)[1]
        found.append((stage, name, arguments))
    return found


def _base(stage: str) -> str:
    return next(
        arguments.split(" AS ")[0] for where, name, arguments in _instructions() if (where, name) == (stage, "FROM")
    )


def _lock(name: str) -> dict[str, str]:
    """Package → version, of a file in which every package has its hash."""
    lines = [
        line for line in (REPOSITORY / "requirements" / name).read_text().splitlines() if line[:1] not in ("", "#")
    ]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if match is None]
    return {match[1]: match[2] for match in matches if match}


def test_every_copied_path_exists_and_is_sent() -> None:
    sent = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for _, name, arguments in _instructions():
        if name == "COPY" and not arguments.startswith("--from="):
            for source in arguments.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert source.split("/")[0] in sent, source


def test_the_image_for_gpus_has_the_compiler_that_triton_needs() -> None:
    """Without one no kernel of a GPU starts: a model was served by copies of its contexts."""
    install, _ = (arguments for stage, name, arguments in _instructions() if (stage, name) == ("cuda", "RUN"))
    assert "apt-get install --yes --no-install-recommends gcc libc6-dev" in install


def test_the_wheel_of_what_is_copied_has_all_of_the_code(tmp_path: Path) -> None:
    """As its stage makes it: the files that it copies, where it copies them, and its command."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    steps = [(name, arguments) for stage, name, arguments in _instructions() if stage == "wheel"]
    assert ("WORKDIR", f"/{source.name}") in steps
    for name, arguments in steps:
        if name == "COPY":
            *copied, target = arguments.split()
            for path in copied:
                _copy(REPOSITORY / path, source / target / ("" if target.endswith("/") else "."))
    command, _ = (arguments for name, arguments in steps if name == "RUN")  # the second installs it
    command = command.replace("/wheels", str(wheels)).replace("pip ", f"{sys.executable} -m pip ")
    subprocess.run([*command.split(), "--no-index", "--quiet"], cwd=source, check=True, timeout=120)
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        [entry_points] = [archive.read(name).decode() for name in inside if name.endswith("entry_points.txt")]
    files = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {file for file in files if not file.startswith(NOT_SERVED)} <= inside
    assert not [name for name in inside if name.startswith((NOT_SERVED, "tests"))]
    for script in (Path(LAUNCHER).name, _command()[0]):
        assert re.search(rf"^{script} *= *\S+:\S+$", entry_points, re.MULTILINE)


def _copy(source: Path, target: Path) -> None:
    """As COPY does, without what .dockerignore leaves out."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _command() -> list[str]:
    """What a container runs when it is told nothing."""
    [command] = [arguments for stage, name, arguments in _instructions() if (stage, name) == ("runtime", "CMD")]
    words: list[str] = json.loads(command)
    return words


def test_the_command_is_one_that_the_cli_takes() -> None:
    program, *arguments = _command()
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[program] == "cluster.cli:main"
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(app, [*arguments, "--no-such-option"]).exit_code == 2


def test_the_health_check_tells_a_server_that_is_ready_from_one_that_is_not() -> None:
    """Its own command, run beside a server that answers, one that does not, and none."""
    [check] = [arguments for _, name, arguments in _instructions() if name == "HEALTHCHECK"]
    words: list[str] = json.loads(check[check.index("CMD [") + 4 :])
    assert words[0] == "python"
    outcomes = []
    for status in (200, 503, None):
        with _answering(status) as port:
            command = [sys.executable, *(word.replace("8000", str(port)) for word in words[1:])]
            outcomes.append(subprocess.run(command, capture_output=True, timeout=240, check=False).returncode)
    assert outcomes == [0, 1, 1]


@contextmanager
def _answering(status: int | None) -> Iterator[int]:
    """The port of a server that answers /health with this status; with None nobody listens there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert status is not None
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if status is None:
            server.server_close()
            yield server.server_port
            return
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_stages_that_are_named_exist() -> None:
    stages = {stage for stage, _, _ in _instructions()}
    for _, name, arguments in _instructions():
        if name == "FROM":
            base = arguments.split(" AS ")[0]
            assert base in stages or base == "${PYTHON_IMAGE}"
        if name == "COPY" and arguments.startswith("--from="):
            assert arguments.split()[0].removeprefix("--from=") in stages


def test_what_runs_is_not_root() -> None:
    for stage in STAGES:
        users = [arguments for where, name, arguments in _instructions() if (where, name) == (stage, "USER")]
        assert users == [f"{USER}:{USER}"]
        assert _base(stage) == "runtime"
    runtime = [(name, arguments) for stage, name, arguments in _instructions() if stage == "runtime"]
    assert ("WORKDIR", CONTAINER_USER_HOME) in runtime
    assert any(name == "RUN" and f"--uid {USER}" in arguments for name, arguments in runtime)


def test_pods_find_haproxy_where_the_image_has_it() -> None:
    environment = next(arguments for stage, name, arguments in _instructions() if (stage, name) == ("runtime", "ENV"))
    assert f"PATH={Path(LAUNCHER).parent}:" in environment
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(LAUNCHER).name in scripts


def test_nothing_is_installed_without_a_hash() -> None:
    for _, name, arguments in _instructions():
        if name == "RUN":
            for command in re.split(r"&&|\|\||;", arguments):
                if "pip install" in command and "/wheels/" not in command:  # our own wheel, made in the stage before
                    assert "--require-hashes" in command, command


def test_versions_are_those_of_the_tests() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    )
    common, cuda = _lock("common.txt"), _lock("torch-cuda.txt")
    assert not set(common) & set(cuda)
    assert cuda["torch"] == pins["torch"]
    for name, version in common.items():
        assert pins[name] == version, name
    torch = (REPOSITORY / "requirements" / "torch-cpu.txt").read_text()
    assert re.search(rf"^torch=={re.escape(pins['torch'])}\+cpu --hash=sha256:[0-9a-f]{{64}}$", torch, re.MULTILINE)


def test_a_new_version_of_the_code_is_a_small_layer() -> None:
    """It was in one layer with all packages, 2 GB that every node pulled for each version."""
    for stage in STAGES:
        copied = [
            arguments.split()[0] for where, name, arguments in _instructions() if (where, name) == (stage, "COPY")
        ]
        assert copied[:2] == [f"--from={stage}-environment", "--from=wheel"]
        environment = [arguments for where, _, arguments in _instructions() if where == f"{stage}-environment"]
        assert not [arguments for arguments in environment if "wheel" in arguments]


def test_the_list_of_packages_has_a_licence_for_each() -> None:
    """Of what is installed here; an image makes its own when it is built."""
    program = REPOSITORY / "requirements" / "sbom.py"
    said = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=240).stdout
    components = json.loads(said)["components"]
    assert {"torch", "ray", "numpy"} <= {one["name"] for one in components}
    assert [one["name"] for one in components if not one["licenses"]] == []


def test_the_locks_hold_all_that_is_needed() -> None:
    """Everything that the code requires, and what that requires, as the installed packages say."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["otel"])]
    locked = {**_lock("common.txt"), **_lock("build.txt"), **_lock("torch-cuda.txt")}
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        assert name in locked, f"{requirement} is in no lock"
        if name == "torch" or name.startswith("nvidia"):
            continue  # the build that is installed here may be another
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if any(
                needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                wanted.append(needed)
    assert len(seen) > 50
