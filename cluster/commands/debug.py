"""`manta debug bundle`: one file for a bug report, of what runs here. Changes nothing; what cannot be had it says.

README.txt      what is in it, what could not be had, and what is wrong, as `manta status` says and processes show
processes.txt   the processes of Ray, Serve and Manta here, with their state: T is stopped, Z has ended
health.json     what the gateway says of its models
status.json     as `manta status --json`, kernels among it
metrics.txt     its page of figures
stacks/PID.txt  what each of them that is Python is doing, by py-spy
logs/…          the ends of the logs of that cluster on this machine; without one, of Ray's last session here
versions.json   machine and packages
config.json     the configuration with its defaults; names files of keys and secrets, holds none

It is made of a server that stands still as well: each part is waited for a bounded time.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.local_ray.private_files import session_logs
from cluster.errors import ConfigError, MantaError

if TYPE_CHECKING:
    import psutil

app = typer.Typer(name="debug", help="Collect what a bug report needs.", no_args_is_help=True)

LOG_TAIL_BYTES = 256 << 10
MAX_LOGS = 200  # the newest
STACK_TIMEOUT_S = 10.0
STACKS_TIMEOUT_S = 60.0  # for all of them

_README = """\
What `manta debug bundle` collected on {when}. Look through it before you send it.
It names machines, models and the ids of keys, and logs may hold what libraries wrote.
It has no key, no secret and, as far as Manta writes it, no prompt and no answer.

"""

# What libraries may have written: user and password in a URL, tokens of HTTP and of the hub, keys of ours.
_SECRETS = (
    rb"(?<=://)[^/\s@\"']{1,200}(?=@)",
    rb"(?<=[Bb]earer )[^\s\"']{8,}",
    rb"\bhf_[A-Za-z0-9]{16,}",
    rb"\bmanta-[A-Za-z0-9_-]{43}(?![\w-])",
)
_SECRET = re.compile(b"|".join(_SECRETS))

_COMMAND_LINE = re.compile(rb"\AProcess .*\n")  # py-spy's first, with arguments
_NATIVE = ("raylet", "gcs_server", "haproxy")
_STATES = {"stopped": "T", "zombie": "Z", "disk-sleep": "D"}  # psutil's words, and those of ps

Part = tuple[str, bytes]  # its name in the bundle, and what it holds


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def bundle(
    file: Annotated[
        Path | None, typer.Argument(dir_okay=False, metavar="[FILE]", help="Default: manta-debug-TIME.tar.gz, here.")
    ] = None,
    address: Annotated[str, typer.Option(metavar="RAY", help="The Ray cluster: auto, or host:port.")] = "auto",
    url: Annotated[str, typer.Option(metavar="URL", help="The gateway's.")] = "http://127.0.0.1:8000",
    metrics_token_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Of gateway.metrics_token_file.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="The configuration served.")
    ] = None,
) -> None:
    """Collect versions, configuration, status, figures, ends of logs and stacks into one file for a bug report."""
    target = file or Path(time.strftime("manta-debug-%Y%m%d-%H%M%S.tar.gz"))
    cluster_logs: list[Path] = []  # told with the status
    wrong: list[str] = []  # too
    parts: dict[str, Callable[[], Iterator[Part]]] = {  # what mends itself soon comes first
        "processes": lambda: _processes(wrong),
        "health": lambda: _of_gateway(url, "/health", "health.json", None),
        "status": lambda: _status(address, cluster_logs, wrong),
        "metrics": lambda: _of_gateway(url, "/metrics", "metrics.txt", metrics_token_file),
        "stacks": _stacks,
        "logs": lambda: tails(cluster_logs[0] if cluster_logs else session_logs()),
        "versions": _versions,
        "configuration": lambda: _configuration(config),
    }
    missing = write(target, parts, wrong)
    for name, why in missing.items():
        typer.echo(f"not in it: {name}: {why}")
    for one in wrong:
        typer.echo(f"wrong: {one}")
    typer.echo(f"Wrote {target}. Look through it before you send it.")


def write(target: Path, parts: dict[str, Callable[[], Iterator[Part]]], wrong: Sequence[str] = ()) -> dict[str, str]:
    """Collect all parts into a file that only its owner may read. Returns which could not be had, and why.

    `wrong`, which parts may fill, is told beside. Raises ConfigError where the file cannot be written.
    """
    missing: dict[str, str] = {}
    try:
        target.touch(mode=0o600, exist_ok=False)
        with tarfile.open(target, "w:gz") as archive:
            for name, collect in parts.items():
                num_before = len(archive.getmembers())
                try:
                    for member, content in collect():
                        _add(archive, member, content)
                except Exception as error:  # whatever is broken is why somebody collects this
                    missing[name] = str(error).strip() or type(error).__name__
                else:
                    if len(archive.getmembers()) == num_before:
                        missing[name] = "there is none here"
            readme = _README.format(when=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
            lines = [f"not in it: {name}: {why}\n" for name, why in missing.items()]
            lines += [f"wrong: {one}\n" for one in wrong]
            _add(archive, "README.txt", (readme + "".join(lines)).encode())
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    return missing


def tails(logs: Path | None) -> Iterator[Part]:
    """The ends of the newest files of a folder and those below, in whole lines: half a secret would not be known."""
    if logs is None:
        return
    ages: dict[Path, float] = {}
    for file in logs.rglob("*"):
        with suppress(OSError):  # it has gone meanwhile
            if file.is_file() and not file.is_symlink():
                ages[file] = file.stat().st_mtime
    for file in sorted(ages, key=lambda one: ages[one])[-MAX_LOGS:]:
        content = b""
        with suppress(OSError), file.open("rb") as stream:  # gone, or another user's
            if (size := file.stat().st_size) > LOG_TAIL_BYTES:
                stream.seek(size - LOG_TAIL_BYTES - 1)
                stream.readline()
            content = stream.read(LOG_TAIL_BYTES)
        if content:
            yield f"logs/{file.relative_to(logs)}", content


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    content = _SECRET.sub(b"(taken out)", content)
    entry = tarfile.TarInfo(f"manta-debug/{name}")
    entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
    archive.addfile(entry, io.BytesIO(content))


def _json(document: object) -> bytes:
    return json.dumps(document, indent=2, default=str).encode()


def _versions() -> Iterator[Part]:
    import importlib.metadata

    from cluster.commands.bench.machine import this_machine

    packages = {one.name: one.version for one in importlib.metadata.distributions()}
    yield "versions.json", _json({"machine": this_machine().to_json(), "packages": dict(sorted(packages.items()))})


def _configuration(file: Path | None) -> Iterator[Part]:
    if file is None:
        raise ConfigError("give --config, if there is one")
    from cluster.config import load_config

    yield "config.json", _json(load_config(file).model_dump(mode="json"))


def _of_gateway(url: str, path: str, name: str, token_file: Path | None) -> Iterator[Part]:
    from cluster.commands.gateway_page import read_page

    status, content = read_page(url.rstrip("/") + path, path, token_file)
    yield name, content
    if status in (401, 403):
        raise ConfigError(f"{url}{path} answers {status}: give --metrics-token-file")


def _status(address: str, logs: list[Path], wrong: list[str]) -> Iterator[Part]:
    from cluster.commands.status.command import document

    told = document(address)
    logs.append(Path(told["logs"]))
    wrong += [finding["wrong"] for finding in told["findings"]]
    yield "status.json", _json(told)


def _ours() -> Iterator[tuple[psutil.Process, str]]:
    """Processes of Ray, Serve and Manta here, with a name without arguments: those may be secret."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith("ray::"):
            yield process, words[0]
        elif Path(words[0]).name in _NATIVE:
            yield process, Path(words[0]).name
        elif any(Path(word).name == "manta" for word in words[:2]):
            yield process, "manta"


def _processes(wrong: list[str]) -> Iterator[Part]:
    """Those that are stopped are told as well: `manta status` may not get so far."""
    import psutil

    lines = []
    for process, name in _ours():
        with suppress(psutil.Error), process.oneshot():
            started = time.strftime("%m-%d %H:%M:%S", time.localtime(process.create_time()))
            state = _STATES.get(process.status(), process.status())
            cpu_s, mib = sum(process.cpu_times()[:2]), process.memory_info().rss >> 20
            lines.append(f"{process.pid:>8} {state:<8} {started} {cpu_s:>9.1f} {mib:>7} {name}\n")
            if state == "T":
                wrong.append(f"{name} is stopped (state T); `kill -CONT {process.pid}` lets it go on")
    if lines:
        yield "processes.txt", ("     PID state    started          CPU s     MiB\n" + "".join(lines)).encode()


def _stacks() -> Iterator[Part]:
    """Of those that are Python, as far as this user may look at them. Also one that is stopped can be looked at."""
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None:
        raise MantaError("py-spy is not installed")
    ends_at = time.monotonic() + STACKS_TIMEOUT_S
    for process, name in _ours():
        if name in _NATIVE:
            continue
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise MantaError(f"all that could be had in {STACKS_TIMEOUT_S:g} s are in it")
        command = [py_spy, "dump", "--nonblocking", "--pid", str(process.pid)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=min(left_s, STACK_TIMEOUT_S))
            found = _COMMAND_LINE.sub(b"", done.stdout) + done.stderr
        except subprocess.TimeoutExpired:
            found = b"py-spy did not end in time"
        yield f"stacks/{process.pid}.txt", name.encode() + b"\n" + found
