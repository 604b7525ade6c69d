"""The command `manta`: names, options and exit codes. Each command's module is imported when it runs, not before.

Exit codes: 0 all went well; 1 a command finished but something in it failed; 2 wrong usage, or a MantaError, which is
shown as one line.
"""

from __future__ import annotations

import importlib.metadata
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands import debug, keys
from cluster.commands.bench import command as bench
from cluster.commands.k8s import command as k8s
from cluster.errors import MantaError

app = typer.Typer(
    name="manta",
    help="Serves sparse mixture-of-experts language models on Ray.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench.app)
app.add_typer(k8s.app)
app.add_typer(keys.app)
app.add_typer(debug.app)


def main() -> None:
    """Entry point."""
    try:
        app()
    except MantaError as error:
        _show(error)
        raise SystemExit(2) from None


def _show(error: MantaError) -> None:
    from rich.console import Console

    line = " ".join(str(error).split())
    Console(stderr=True, soft_wrap=True).print(
        f"Error: {line}", style="red", markup=False, highlight=False, emoji=False
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manta {importlib.metadata.version('manta-serve')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint directory or a hub id; without it the embedded demo model.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub id: a commit, a branch or a tag. [default: main]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML configuration, instead of MODEL.")] = None,
    host: Annotated[
        str | None, typer.Option(envvar="MANTA_HOST", help="Where HTTP listens. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port. [default: 8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="gRPC port. [default: 9000]")] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MANTA_API_KEYS_FILE", help="Hashes of API keys; without it only this machine is answered."
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="RAY", help="A running Ray cluster to join, instead of starting one.")
    ] = None,
    accept_any_model: Annotated[
        bool, typer.Option("--accept-any-model", help="Answer requests for unknown models with the first one.")
    ] = False,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C."""
    from cluster.commands.local_ray import ray_environment
    from cluster.commands.serve.supervised import supervise

    if address is None:
        ray_environment.prepare_server()
    else:
        ray_environment.prepare()
    supervise(waits_for_streams=address is not None)
    from cluster.commands.serve.command import run

    gateway = {
        "host": host,
        "http_port": port,
        "grpc_port": grpc_port,
        "api_keys_file": None if api_keys_file is None else api_keys_file.absolute(),
        "accept_any_model": accept_any_model or None,
    }
    run(model, revision, config, address, {key: value for key, value in gateway.items() if value is not None})


@app.command()
def apply(
    config: Annotated[Path, typer.Option(help="A YAML configuration, as manta serve takes it.")],
    address: Annotated[str, typer.Option(metavar="RAY", help="The server's Ray cluster: auto, or host:port.")] = "auto",
    timeout: Annotated[float, typer.Option(min=1, max=10**6, help="Seconds to wait until all of it runs.")] = 3600.0,
) -> None:
    """Change the models of a running server to a configuration's, without a lost request."""
    from cluster.commands.local_ray import ray_environment

    ray_environment.prepare()
    from cluster.commands.apply import run

    run(config, address, timeout)


@app.command()
def fetch(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL[@REVISION]…", help="Hub ids, or checkpoint directories.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Of those that name none: a commit, a branch or a tag. [default: main]")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Fetch nothing; return when somebody else has.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 86400.0,
) -> None:
    """Bring models into the hub's local cache and verify every byte of their weights."""
    from cluster.commands.fetch import run

    run(models, revision, wait=wait, timeout_s=timeout)


class _ModelImpl(StrEnum):
    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"


class _Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class _Numbers(StrEnum):
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


class _Parts(StrEnum):
    LAYERS = "layers"
    EXPERTS = "experts"
    ATTENTION = "attention"


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id, in bf16, fp16 or fp32.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write: a new or an empty directory.")],
    to: Annotated[_Numbers, typer.Option(help="What weights are rounded to.")],
    group_size: Annotated[
        int | None, typer.Option(min=16, max=1024, help="Inputs that share a scale, of int8 and int4. [default: 128]")
    ] = None,
    parts: Annotated[_Parts, typer.Option(help="Whose matrices; the others stay as they are.")] = _Parts.LAYERS,
    revision: Annotated[
        str | None, typer.Option(help="Of a hub id: a commit, a branch or a tag. [default: main]")
    ] = None,
) -> None:
    """Write a checkpoint rounded to 8 or 4 bits, in compressed-tensors' layout."""
    from cluster.checkpoint.quantization.rounding import Rounding
    from cluster.commands.quantize import run

    if group_size is not None and (to is _Numbers.FP8 or group_size % 8):
        why = "fp8 has a scale for each output" if to is _Numbers.FP8 else "expected a multiple of 8"
        raise typer.BadParameter(why, param_hint="--group-size")
    run(model, revision, directory, Rounding.to(to.value, group_size or 128, parts.value))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Any server that speaks OpenAI's HTTP API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Without it, the first that the server lists.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file whose first line is the API key.")
    ] = None,
) -> None:
    """Chat in the terminal with a running server."""
    from cluster.commands.chat.command import run

    raise typer.Exit(run(url, model, key_file))


@app.command()
def config() -> None:
    """Print every key of the configuration file, with value, default and meaning, as Markdown."""
    from cluster.commands.config import reference

    typer.echo(reference(), nl=False)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint directory, demo, mixtral-8x7b, or a hub id that is known.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML configuration, instead of MODEL.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The GPUs' type, by Ray's name for it. [default: H100]")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="At most so many. With --ram: so many cards; 0: all on CPUs.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="With --ram: of a card, 24GB, where --gpu does not say it.")
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Propose experts.tiers: some experts on the cards, the others in 64GB."),
    ] = None,
    ram_bandwidth: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s of that memory. [default: 40, which is assumed]")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores beside that memory. [default: 8, which is assumed]")
    ] = None,
    observed: Annotated[
        str | None, typer.Option(metavar="URL", help="A running server's /metrics: which experts are asked for most.")
    ] = None,
    observed_token_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its first line opens that /metrics.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="How many are decoded at once. [default: 64; with tiers 1]")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each in the cache.")] = 4096,
    milliseconds: Annotated[
        float | None, typer.Option(min=0.001, help="A token of each, at most: the fewest GPUs that reach it.")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s between processes, in each direction. [default: as measured of lanes]"),
    ] = None,
    dispatch: Annotated[
        float | None, typer.Option(min=0, help="Microseconds of one layer's dispatch. [default: as measured of lanes]")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="What manta doctor --profile measured, in place of assumptions."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="What engine.quantization takes. [default: as the configuration says]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Show the processes a model needs on GPUs of one type, their memory, and the speed to expect."""
    from cluster.commands.plan import command
    from cluster.planning.costs import ASSUMED
    from cluster.planning.plan import Target
    from cluster.planning.profile import read_profile
    from cluster.planning.roofline import Link, Load

    if dtype not in ("auto", "bfloat16", "float32"):
        raise typer.BadParameter("expected auto, bfloat16 or float32", param_hint="--dtype")
    step_s = float("inf") if milliseconds is None else milliseconds / 1e3
    target = Target(Load(sequences or 64, context), step_s, gpus)
    lanes = None
    measured = None if profile is None else read_profile(profile)
    if link is not None or dispatch is not None:
        known = (ASSUMED if measured is None else measured.costs()).lanes
        times = (known.dispatch_s, known.group_s) if dispatch is None else (dispatch / 1e6, 0.0)
        lanes = Link(known.bandwidth if link is None else link * 1e9, *times)
    question = command.Question(
        gpu,
        target,
        lanes,
        sequences is None,
        dtype,
        quantization,
        gpu_memory,
        ram,
        None if ram_bandwidth is None else ram_bandwidth * 1e9,
        cores,
        observed,
        observed_token_file,
        measured,
    )
    command.run(model, config, question, as_json)


@app.command()
def simulate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML configuration, or a model as manta plan takes it.")
    ],
    model: Annotated[str | None, typer.Option(help="Which of several models of the configuration.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A CSV of arrivals with prompt and output tokens: Azure's, BurstGPT."
        ),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="rate=2,…",
            help="Made arrivals: rate, hours, swing, bursts, burst_factor, burst_s, prompt, output, spread, start.",
        ),
    ] = None,
    scale: Annotated[float, typer.Option(min=0.001, help="So many times as many requests in the same time.")] = 1.0,
    popularity: Annotated[
        str,
        typer.Option(
            help="uniform; zipf:1.0, with :layers, :drift=HOURS; or a running server's URL, for its /metrics."
        ),
    ] = "zipf:0.7:layers",
    observed_token_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Its first line opens that /metrics.")
    ] = None,
    first_token: Annotated[float, typer.Option(min=0.001, help="Seconds until the first token, to be good.")] = 2.0,
    token: Annotated[float, typer.Option(min=0.001, help="Milliseconds of each later one, on average.")] = 100.0,
    gpu: Annotated[str | None, typer.Option(help="The GPUs' type, or cpu. [default: the profile's, else H100]")] = None,
    profile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What manta doctor --profile measured.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Of a machine with experts on CPUs. [default: 8]")] = None,
    quantization: Annotated[str | None, typer.Option(help="What engine.quantization takes.")] = None,
    variants: Annotated[
        str, typer.Option(help="Of whole (a), together (b), single (c), tiers (d).")
    ] = "whole,together,single,tiers",
    max_replicas: Annotated[
        int, typer.Option(min=1, help="Of a deployment that the configuration keeps at one number.")
    ] = 64,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Scale nothing that the configuration keeps at one number.")
    ] = False,
    whole_gpus: Annotated[
        int | None, typer.Option(min=1, help="Of a replica of the whole model. [default: the fewest that hold it]")
    ] = None,
    start: Annotated[float, typer.Option(min=0, help="Seconds until a new replica begins to load.")] = 20.0,
    load_bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s of weights that are loaded.")] = 2.0,
    alone: Annotated[
        bool, typer.Option("--alone", help="Rows of several coordinators never share a batch of a shard.")
    ] = False,
    keep_batch: Annotated[
        bool,
        typer.Option(
            "--keep-batch",
            help="engine.max_num_seqs as configured, not the most of 512 that steps within --token let be.",
        ),
    ] = False,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds whose requests are not counted.")] = 900.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and popularity.")] = 0,
    break_even: Annotated[
        bool, typer.Option("--break-even", help="Even loads instead, over load, skew and length of prompts.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Draw a .png or an .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Serve hours of requests in simulated time: whole replicas, experts together, one by one, and on tiers."""
    from cluster.commands.simulate.command import Question, chosen, run
    from cluster.simulation.fleet.outcome import Objective
    from cluster.simulation.fleet.variants import Options

    run(
        Question(
            config=config,
            model=model,
            trace=trace,
            synthetic=synthetic,
            scale=scale,
            popularity=popularity,
            observed_token_file=observed_token_file,
            objective=Objective(first_token, token / 1e3, warm_up),
            gpu=gpu,
            profile=profile,
            cores=cores,
            quantization=quantization,
            variants=chosen(variants),
            options=Options(max_replicas, fixed, whole_gpus, start, load_bandwidth * 1e9, not alone),
            keep_batch=keep_batch,
            seed=seed,
            as_json=as_json,
            plot=plot,
            break_even=break_even,
        )
    )


@app.command()
def status(
    address: Annotated[str, typer.Option(metavar="RAY", help="The Ray cluster: auto, or host:port.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the load of every expert, as it changes.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show what computes in each process, and how fast it was measured to be.")
    ] = False,
) -> None:
    """Show deployments, expert groups, nodes, queue, KV use and rows per expert of a running cluster."""
    from cluster.commands.status.command import run, watch_load

    if watch:
        watch_load(address)
    else:
        run(address, as_json=as_json, kernels=kernels)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, demo, or a hub id, which is fetched.")],
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a model on the hub.")] = None,
    model_impl: Annotated[_ModelImpl, typer.Option(help="Whose code computes our side.")] = _ModelImpl.AUTO,
    dtype: Annotated[_Dtype, typer.Option(help="What both sides compute in.")] = _Dtype.AUTO,
    tokens: Annotated[int, typer.Option(min=1, max=128, help="Generated after each prompt.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Compute a model here and by transformers, both in memory one after the other, and say where they differ."""
    from cluster.commands.verify.command import run

    if not run(model, revision, model_impl.value, dtype.value, tokens, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def doctor(
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Look at it as well: a directory, or a hub id, which is fetched."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, metavar="FILE", help="Measure this machine as well, for manta plan --profile FILE."
        ),
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="GPUs alone, as manta serve looks at them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Look whether this machine can serve: versions, memory, sockets, kernels, a whole model beside transformers."""
    from cluster.commands.doctor.command import run

    if not run(as_json=as_json, model=checkpoint, profile=profile, short=short):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
