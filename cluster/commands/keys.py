"""`manta keys`: makes API keys. Prints a key once; nothing keeps it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ConfigError

app = typer.Typer(name="keys", help="Make API keys.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="ID", help="What logs and metrics call the key.")],
    file: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Add the entry to this file, made if need be, and print the key alone."),
    ] = None,
) -> None:
    """Print a new key, and the entry for the file that gateway.api_keys_file names."""
    from pydantic import ValidationError

    from gateway.admission.api_keys import EXPECTED, ApiKey, digest, new_key

    key = new_key()
    try:
        entry = ApiKey(id=name, sha256=digest(key))
    except ValidationError:
        raise typer.BadParameter(f"expected {EXPECTED['id']}") from None
    line = f"- {{id: {json.dumps(entry.id)}, sha256: {json.dumps(entry.sha256)}}}"
    if file is not None:
        _add(file, name, line)
        typer.echo(key)
        typer.echo(f"{file} has the entry of {name}. The key is shown only now.", err=True)
        return
    typer.echo(f"key, shown only now:\n\n  {key}\n")
    typer.echo("entry for the API-keys file:\n")
    typer.echo(line)


def _add(file: Path, name: str, line: str) -> None:
    """Raises ConfigError where the file would not be one of keys then, has that id, or cannot be written."""
    from cluster.guarded_file import read_guarded
    from gateway.admission.api_keys import read_api_keys

    try:
        content = read_guarded(file) if file.exists() else b""
        if content and name in {one.id for one in read_api_keys(file)}:
            raise ConfigError(
                f"{file} has a key of {name} already: take its line out first, which ends that key, or choose "
                "another id"
            )
        added = (b"" if not content or content.endswith(b"\n") else b"\n") + line.encode() + b"\n"
        with tempfile.TemporaryDirectory() as directory:
            tried = Path(directory) / file.name
            _append(tried, content + added)
            try:
                read_api_keys(tried)
            except ConfigError as error:
                raise ConfigError(str(error).replace(str(tried), str(file))) from None
        _append(file, added)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def _append(file: Path, content: bytes) -> None:
    """A file that is there keeps its mode and owner; a new one is its owner's alone, whatever the umask."""
    with open(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600), "wb") as end:
        end.write(content)
