"""`manta k8s`: manifests from a configuration, checks of manifests, Secrets, and the drain of a pod."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="k8s", help="Make and check Kubernetes manifests.", no_args_is_help=True)

POD_LOG = "/proc/1/fd/2"


@app.command()
def render(
    config: Annotated[Path, typer.Option(help="A YAML configuration, as `manta serve --config` takes it.")],
) -> None:
    """Print the manifests that a configuration decides; `k8s/base` holds those that none does."""
    from cluster.config import load_config
    from cluster.kubernetes.manifests import render as rendered

    typer.echo(rendered(load_config(config)), nl=False)


@app.command()
def check(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="YAML files, or kustomize directories.")],
) -> None:
    """Say what is wrong with manifests, one line each. Exits with 1 if anything is."""
    from cluster.kubernetes.check.documents import read_documents
    from cluster.kubernetes.check.problems import problems

    documents = read_documents(paths)
    found = list(problems(documents))
    for problem in found:
        typer.echo(problem)
    if found:
        raise typer.Exit(1)
    typer.echo(f"{len(documents)} documents, no problem found")


@app.command()
def secrets(
    create: Annotated[
        bool, typer.Option("--create", help="Inside a pod: make those that are missing, instead of printing.")
    ] = False,
) -> None:
    """Print fresh Secrets, for `kubectl create -f -`: Ray's token, lanes, /metrics, and a first API key."""
    import yaml

    from cluster.commands.k8s.secrets import create_missing, fresh_secrets

    if create:
        typer.echo(f"made: {', '.join(create_missing()) or 'none, all are there'}")
    else:
        typer.echo(yaml.safe_dump_all(fresh_secrets(), sort_keys=False), nl=False)


@app.command()
def drain(
    timeout: Annotated[float, typer.Option(help="Seconds until the pod is stopped all the same.")] = 600.0,
) -> None:
    """Inside a pod that is to stop: have its work placed elsewhere, and wait until its streams have ended."""
    from cluster.commands.k8s.drain import run

    if not run(timeout, say=_tell):
        _tell("time is over; what is left will be cut")
        raise typer.Exit(1)


def _tell(text: str) -> None:
    """Also in the pod's log: Kubernetes shows nobody what a hook says."""
    typer.echo(text, err=True)
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        with suppress(OSError), open(os.open(POD_LOG, os.O_WRONLY | os.O_APPEND), "w") as log:
            log.write(f"manta k8s drain: {text}\n")
