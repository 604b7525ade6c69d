"""The command `manta bench`: names and options of its benchmarks. Each one's module is imported when it runs.

Each prints hardware, versions, model and lengths first, shows progress on stderr, and ends in one JSON line on stdout.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.local_ray import ray_environment

app = typer.Typer(
    name="bench",
    help="Measure: dispatch, decode, an engine's step, its divergence, sampling, a served model.",
    no_args_is_help=True,
)


class ShapeName(StrEnum):
    """The shapes that `make-model` knows."""

    BENCH = "bench"
    BENCH_QWEN3_MOE = "bench-qwen3-moe"
    MIXTRAL_8X7B = "mixtral-8x7b"


class TransportName(StrEnum):
    """How rows travel."""

    AUTO = "auto"
    HOST = "host"  # auto, but for memory of GPUs
    LANE = "lane"
    OBJECT_STORE = "object_store"
    LOCAL = "local"


class CarrierName(StrEnum):
    """What moves the rows of a dispatch; `auto` chooses."""

    AUTO = "auto"
    MEMORY = "memory"
    LANE = "lane"
    OBJECT_STORE = "object_store"
    LOCAL = "local"


class DtypeName(StrEnum):
    """What weights and activations are held in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class QuantizationName(StrEnum):
    """What weights of a plain checkpoint are rounded to, as `engine.quantization` has it."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


class ModelImplName(StrEnum):
    """Whose code computes the model, as `model_impl` has it."""

    AUTO = "auto"
    NATIVE = "native"
    TRANSFORMERS = "transformers"


class KvCacheDtypeName(StrEnum):
    """What keys and values are kept in, as `engine.kv_cache_dtype` has it."""

    AUTO = "auto"
    INT8 = "int8"


class Rival(StrEnum):
    """What `decode` can be compared with."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"
    LOCAL = "local"  # Manta itself, with its experts in the engine's process


class ServeRival(StrEnum):
    """What `serve` can be compared with."""

    TRANSFORMERS = "transformers"


class GgufTypeName(StrEnum):
    """What llama.cpp's weights are stored in."""

    F32 = "f32"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


@app.command()
def make_model(
    shape: Annotated[ShapeName, typer.Argument(help="bench…: 0.8 B parameters each; mixtral-8x7b: 46.7 B, 93 GB.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made, or empty.", file_okay=False)],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many, where all would not fit. [default: all]", show_default=False),
    ] = None,
) -> None:
    """Write a random model in bf16 in the hub's layout, with a tokenizer, so that it can be served."""
    from cluster.commands.bench.make_model import run

    run(shape.value, directory, seed, layers)


@app.command()
def dispatch(
    rows: Annotated[list[int], typer.Option(min=1, help="Rows of a batch; repeat for several.")] = [1, 16, 64, 512],  # noqa: B006
    groups: Annotated[list[int], typer.Option(min=1, help="Expert groups; repeat for several.")] = [1, 2, 8],  # noqa: B006
    hidden: Annotated[int, typer.Option(min=1, help="Numbers in a row.")] = 4096,
    dtype: Annotated[DtypeName, typer.Option(help="Of a number.")] = DtypeName.BFLOAT16,
    repeats: Annotated[int, typer.Option(min=1, help="Round trips of each measurement.")] = 300,
    transport: Annotated[list[CarrierName], typer.Option(help="Repeat for several.")] = [  # noqa: B006
        CarrierName.MEMORY,
        CarrierName.LANE,
        CarrierName.OBJECT_STORE,
        CarrierName.LOCAL,
    ],
    profile: Annotated[
        bool, typer.Option(help="Also: which calls a dispatch makes, here and in a shard, and what they take.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Draw cost over rows.")] = None,
) -> None:
    """Time one layer's dispatch and combine, without maths, for each transport."""
    ray_environment.prepare_benchmark()
    from cluster.commands.bench.dispatch import run

    names = tuple(one.value for one in transport)
    run(tuple(rows), tuple(groups), hidden, dtype.value, repeats, names, plot, profile=profile)


@app.command()
def decode(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint directory or a hub id; else the embedded demo model."),
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences in a step; repeat for several.")] = [1, 16],  # noqa: B006
    transport: Annotated[
        TransportName, typer.Option(help="How rows reach the experts; host: auto without memory of GPUs.")
    ] = TransportName.LOCAL,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Expert groups. [default: 1 for local, else at most 4]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt, for the decode figures.")] = 64,
    context: Annotated[
        list[int],
        typer.Option(
            min=1, help="Instead of a prompt, tokens in the KV cache that nobody computed; repeat for several."
        ),
    ] = [],  # noqa: B006
    output_tokens: Annotated[int, typer.Option(min=2, help="Generated by each sequence.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each measurement; the median counts.")] = 5,
    compare: Annotated[
        list[Rival],
        typer.Option(
            help="Run it in turn with the engine; local: experts in this process, which says what separation costs. "
            "Repeat for several."
        ),
    ] = [],  # noqa: B006
    gguf_type: Annotated[
        list[GgufTypeName], typer.Option(help="For llama.cpp: of its weights; repeat for several.")
    ] = [GgufTypeName.BF16],  # noqa: B006
    dtype: Annotated[DtypeName, typer.Option(help="auto: the checkpoint's own.")] = DtypeName.AUTO,
    quantization: Annotated[
        list[QuantizationName],
        typer.Option(
            help="Round weights while they are read; an engine for each, all run in turn: repeat for several."
        ),
    ] = [QuantizationName.NONE],  # noqa: B006
    kv_cache_dtype: Annotated[
        list[KvCacheDtypeName], typer.Option(help="What keys and values are kept in; an engine for each, as above.")
    ] = [KvCacheDtypeName.AUTO],  # noqa: B006
    model_impl: Annotated[
        list[ModelImplName], typer.Option(help="Whose code computes the model; an engine for each, as above.")
    ] = [ModelImplName.AUTO],  # noqa: B006
    prefill: Annotated[
        list[str],
        typer.Option(
            metavar="NxM", help="Also time N prompts of M tokens; repeat for several. [default: 16x64, 1x2048]"
        ),
    ] = [],  # noqa: B006
    no_prefill: Annotated[bool, typer.Option("--no-prefill", help="Time no prefill; --context implies it.")] = False,
    shard_cores: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cores that shards have for themselves, all else the others, as where cores suffice. "
            "[default: all run on all]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time engine steps without the gateway, against the memory bandwidth and against other engines."""
    ray_environment.prepare_benchmark()
    from cluster.commands.bench.decode.cores import Cores
    from cluster.commands.bench.openmp import load_torch
    from cluster.config import EngineConfig
    from cluster.errors import ConfigError

    cores = None
    if shard_cores is not None:
        if transport is TransportName.LOCAL:
            raise ConfigError("--shard-cores: give --transport auto, so that there are shards")
        cores = Cores.split(shard_cores)
        cores.take_engines()  # before torch counts them
    load_torch(EngineConfig().openmp_spin_count)
    from cluster.commands.bench.decode.decode import Plan, run
    from cluster.commands.bench.decode.setup import prefills_named

    if context and prefill:
        raise ConfigError("give either --context or --prefill: a prompt that is in the cache is not computed")
    run(
        model,
        Plan(
            batches=tuple(batch),
            contexts=tuple(context),
            transport=transport.value,
            num_groups=groups,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            pairs=pairs,
            transformers=Rival.TRANSFORMERS in compare,
            local=Rival.LOCAL in compare,
            gguf_types=tuple(gguf_type) if Rival.LLAMA_CPP in compare else (),
            dtype=dtype.value,
            quantizations=tuple(dict.fromkeys(name.value for name in quantization)),
            kv_cache_dtypes=tuple(dict.fromkeys(name.value for name in kv_cache_dtype)),
            model_impls=tuple(dict.fromkeys(name.value for name in model_impl)),
            prefills=prefills_named(prefill) if prefill or no_prefill or context else None,
            cores=cores,
        ),
    )


@app.command()
def engine(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint directory or a hub id; else the embedded demo model."),
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences in a step; repeat for several.")] = [64],  # noqa: B006
    context: Annotated[list[int], typer.Option(min=1, help="Tokens before them; repeat for several.")] = [64, 8192],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Of each measurement; the medians count.")] = 30,
    dtype: Annotated[DtypeName, typer.Option(help="auto: the checkpoint's own.")] = DtypeName.AUTO,
) -> None:
    """Time the parts of an engine's step: scheduling, metadata, the model by kind, sampling, delivery."""
    from cluster.commands.bench.openmp import load_torch
    from cluster.config import EngineConfig

    load_torch(EngineConfig().openmp_spin_count)
    from cluster.commands.bench.engine.engine import run

    run(model, batch, context, steps, dtype.value)


@app.command()
def divergence(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A checkpoint directory or a hub id; else the embedded demo model."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Random ones.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Generated after each.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences side by side, where they are not alone.")] = 8,
    dtype: Annotated[DtypeName, typer.Option(help="Compared with fp32. auto: the checkpoint's own.")] = DtypeName.AUTO,
    kv_cache_dtype: Annotated[
        KvCacheDtypeName, typer.Option(help="int8: compared with the cache in the dtype as well.")
    ] = KvCacheDtypeName.AUTO,
) -> None:
    """Compare greedy tokens with those of transformers in the same dtype and in fp32, alone and in a batch."""
    from cluster.commands.bench.openmp import load_torch
    from cluster.config import EngineConfig

    load_torch(EngineConfig().openmp_spin_count)
    from cluster.commands.bench.divergence import run

    run(model, prompts, prompt_tokens, output_tokens, batch, dtype.value, kv_cache_dtype.value)


@app.command()
def sampling(
    rows: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 16,
    vocabulary: Annotated[int, typer.Option(min=128, help="Logits of a row.")] = 32_000,
    rounds: Annotated[int, typer.Option(min=1, help="Of all measurements in turn; the least counts.")] = 50,
) -> None:
    """Time what each wish of a caller adds to choosing a step's tokens."""
    from cluster.commands.bench.sampling import run

    run(rows, vocabulary, rounds)


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="Any server that speaks OpenAI's HTTP API; host:port with --grpc.")],
    model: Annotated[str | None, typer.Option(help="Without it, the first that the server lists.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at any time. [default: 1]", show_default=False)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Instead: requests a second, at random times (Poisson).")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="In all, after one that warms up.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Asked of each request.")] = 64,
    grpc: Annotated[bool, typer.Option("--grpc", help="Speak gRPC (gateway/grpc/proto/chat.proto).")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send text to /v1/chat/completions, not token ids.")] = False,
    extensions: Annotated[
        bool, typer.Option(help="Send ignore_eos and return_token_ids, which some servers refuse.")
    ] = True,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="Goodput: first token within this.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(min=0, help="Goodput: time per later token within this.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file whose first line is the API key.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and arrival times.")] = 0,
    compare: Annotated[
        ServeRival | None, typer.Option(help="Run it in turn with the load, on this machine: needs --checkpoint.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="For --compare: the checkpoint or hub id that is served.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="For --compare: runs of each; the medians count.")] = 3,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Draw the figures.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, metavar="FILE", help="Write every request's figures.")
    ] = None,
) -> None:
    """Load a running server and report latencies, throughput and goodput. Exit code 1 when a request failed."""
    from cluster.commands.bench.serve.figures import Slo
    from cluster.commands.bench.serve.load import Load
    from cluster.commands.bench.serve.serve import run
    from cluster.commands.bench.serve.target import Target
    from cluster.errors import ConfigError

    if (compare is None) != (checkpoint is None):
        raise ConfigError("--compare and --checkpoint go together: transformers loads what the server serves")
    comparison = None
    if checkpoint is not None:
        from cluster.commands.bench.serve.compare import Comparison

        comparison = Comparison(checkpoint, pairs)
    raise typer.Exit(
        run(
            Target(url, model, grpc=grpc, chat=chat, extensions=extensions, key_file=key_file),
            Load(requests, prompt_tokens, output_tokens, concurrency=concurrency, rate=rate, seed=seed),
            Slo(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms),
            plot,
            json_file,
            comparison,
        )
    )
