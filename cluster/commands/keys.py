"""`manta keys`: makes API keys. Prints a key once; nothing keeps it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(name="keys", help="Make API keys.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="ID", help="What logs and metrics call the key.")],
) -> None:
    """Print a new key, and the entry to add to the file that gateway.api_keys_file names."""
    from pydantic import ValidationError

    from gateway.admission.api_keys import ApiKey, digest, new_key

    key = new_key()
    try:
        entry = ApiKey(id=name, sha256=digest(key))
    except ValidationError:
        raise typer.BadParameter("expected 1 to 64 letters, digits, dots, dashes or underscores") from None
    typer.echo(f"key, shown only now:\n\n  {key}\n")
    typer.echo("entry for the API-keys file:\n")
    typer.echo(f"- {{id: {json.dumps(entry.id)}, sha256: {json.dumps(entry.sha256)}}}")
