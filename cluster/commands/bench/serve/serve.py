"""`manta bench serve`: loads a running server and reports what its clients saw. Speaks no protocol itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.commands.bench.machine import this_machine
from cluster.commands.bench.output import Output
from cluster.commands.bench.serve.figures import Outcome, Slo, duration, report
from cluster.commands.bench.serve.load import Load, drive
from cluster.commands.bench.serve.target import Target, connected
from cluster.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from cluster.commands.bench.serve.compare import Comparison

WARM_UP = -1  # the number of a request whose prompt no other has
LATENCIES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "whole request": "latency_ms"}


def run(
    target: Target,
    load: Load,
    slo: Slo,
    plot: Path | None,
    json_file: Path | None,
    comparison: Comparison | None = None,
) -> int:
    """Returns the exit code: 1 when a request failed. Raises Unavailable when not even one to warm up is answered.

    With a comparison the load is run as often as that says, and the figures are those of the run of median throughput.
    """
    if plot is not None:
        from cluster.commands.bench.serve.plot import check_plotting

        check_plotting()
    machine, output = this_machine(), Output()
    output.header(machine, [f"the client's machine; the server: {target.url}, {target.protocol}", str(load)])
    model, outcomes, compared = _compare(target, load, output, comparison)
    output.line(f"model: {model}")
    document: dict[str, Any] = {
        "bench": "serve",
        "url": target.url,
        "protocol": target.protocol,
        "model": model,
        "concurrency": None if load.rate is not None else load.concurrency or 1,
        "rate": load.rate,
        "lengths": {"prompt": load.prompt_tokens, "output": load.output_tokens},
        **report(outcomes, slo),
        **({"transformers": compared} if compared is not None else {}),
        "machine": machine.to_json(),
    }
    _draw(document, outcomes, output)
    if json_file is not None:
        _write(json_file, document | {"each": [outcome.to_json() for outcome in outcomes]})
    if plot is not None:
        from cluster.commands.bench.serve.plot import draw

        draw(outcomes, f"{model} at {target.url} ({target.protocol}): {load}", plot)
    output.json(document)
    return int(document["errors"] > 0)


def _compare(
    target: Target, load: Load, output: Output, comparison: Comparison | None
) -> tuple[str, list[Outcome], dict[str, Any] | None]:
    """The model's name, what its clients saw, and how transformers did in turn with them."""
    if comparison is None:
        return *asyncio.run(_measure(target, load, output)), None
    from cluster.commands.bench.serve.compare import Pair, opened

    pairs: list[Pair] = []
    with opened(comparison, load) as rival:
        for number in range(comparison.pairs):
            before = rival.run() if number % 2 else None  # the first of a pair alternates
            anew = replace(load, seed=load.seed + number)  # the server has the prompts before in its prefix cache
            model, outcomes = asyncio.run(_measure(target, anew, output))
            pairs.append(Pair(outcomes, before or rival.run()))
            if any(outcome.error is not None for outcome in outcomes):
                return model, outcomes, None
    pairs.sort(key=lambda pair: duration(pair.outcomes))
    return model, pairs[len(pairs) // 2].outcomes, rival.to_json(pairs)


async def _measure(target: Target, load: Load, output: Output) -> tuple[str, list[Outcome]]:
    async with connected(target, load) as (client, model):
        with output.progress() as bars:
            bar = bars.add_task("warming up", total=load.requests)
            first = (await client.send(WARM_UP, time.perf_counter())).outcome()
            if first.error is not None:
                raise Unavailable(f"the request that warms up failed: {first.error}: {first.detail}")
            bars.update(bar, description="requests answered")
            return model, await drive(client, load, lambda: bars.advance(bar))


def _draw(document: dict[str, Any], outcomes: Sequence[Outcome], output: Output) -> None:
    """Latencies, throughput, and each kind of error with an example."""
    names = ("mean", "p50", "p90", "p99", "max")
    output.table(
        "latency (ms)",
        ["", *names],
        [
            [title, *(f"{document[key][name]:.2f}" if document[key] else "-" for name in names)]
            for title, key in LATENCIES.items()
        ],
    )
    answered = document["requests"] - document["errors"]
    output.line(
        f"{answered} of {document['requests']} requests in {document['duration_s']:.2f} s: "
        f"{document['output_tokens_per_s']:.1f} output tokens/s, {document['requests_per_s']:.2f} requests/s, "
        f"{document['prompt_tokens']} prompt and {document['output_tokens']} output tokens"
    )
    if (compared := document.get("transformers")) is not None:
        output.line(
            f"transformers ({compared['experts']}, {compared['attention']}): {compared['output_tokens_per_s']:.1f} "
            f"output tokens/s, {compared['tpot_ms']:.1f} ms a step; the server is {compared['throughput_speedup']:.2f} "
            f"and {compared['tpot_speedup']:.2f} times as fast, medians of {compared['pairs']} pairs"
        )
    if "slo" in document:
        output.line(
            f"goodput: {document['goodput_requests_per_s']:.2f} requests/s, "
            f"{100 * document['slo_attainment']:.1f} % of the requests"
        )
    examples: dict[str, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.error is not None:
            examples[outcome.error].append(outcome.detail)
    for kind, details in examples.items():
        output.line(f"{len(details)} × {kind}: {' '.join(details[0].split())}")


def _write(file: Path, document: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
