"""`manta bench sampling`: what each thing that a caller may wish adds to choosing a step's tokens. No model is loaded.

Logits are random and the wishes as costly as may be. Times are what a step waits, on as many threads as a coordinator
takes, the least of all rounds; the wishes are tried in turn in every round, so that what else the machine does meets
them all. `over greedy` is the cost of the wish: the same rows without any cost the first line. `CPU` is what all
threads together took in that round.

Tried, 16 rows of 32,000 on one thread of an AMD EPYC, and not kept:
- A shortlist by torch.topk: 80 µs a row for 512 tokens, 60 for 64, where counting all tokens by their first digit takes
  28; and a flat distribution needs the counts all the same.
- numpy's partition, 200 µs a row, or its sort, 590.
- Counts in two or four tables in turn, so that no token waits for the one before it: 28 and 41 µs a row, and 39 to 105
  where all tokens are alike. One sum for a run of them in a register takes 27 to 29 always.
- Looking for a digit in blocks of 32 first: 18 µs a row where a plain look at all takes 12.
- One, two, four or sixteen rows at once instead of eight: none was faster for more than one wish.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from cluster.commands.bench.machine import this_machine
from cluster.commands.bench.output import Output
from cluster.messages import Request, SamplingParams
from experts_service.kernels.cores import cores
from router_service.sampling.sampler import Sampler
from router_service.scheduling.sequence import Sequence

EOS = 2


def run(rows: int, vocabulary: int, rounds: int) -> None:
    """Prints a table and one JSON line."""
    threads = cores()
    torch.set_num_threads(threads)
    output, machine = Output(), this_machine()
    of_what = f"{rows} rows of {vocabulary} logits, fp32; threads: {threads}; the least of {rounds} rounds"
    output.header(machine, [of_what])
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2
    batches = {name: _sequences(rows, vocabulary, fields) for name, fields in _wishes(vocabulary).items()}
    sampler = Sampler(frozenset({EOS}))
    least_ms = dict.fromkeys(batches, (float("inf"), 0.0))  # and CPU time
    with output.progress() as progress:
        for _ in progress.track(range(rounds), description="rounds"):
            for name, sequences in batches.items():
                started, cpu_before = time.perf_counter(), time.process_time()
                token_ids, _ = sampler(logits, sequences)
                took = time.perf_counter() - started, time.process_time() - cpu_before
                least_ms[name] = min(least_ms[name], (took[0] * 1e3, took[1] * 1e3))
                for sequence, token_id in zip(sequences, token_ids, strict=True):
                    sequence.token_ids.append(token_id)
    greedy, _ = least_ms["greedy"]
    results = [
        {"wish": name, "ms": round(ms, 3), "over_greedy_ms": round(ms - greedy, 3), "cpu_ms": round(cpu_ms, 3)}
        for name, (ms, cpu_ms) in least_ms.items()
    ]
    output.table(
        "ms a step",
        ("wish", "in all", "over greedy", "CPU"),
        ((str(one["wish"]), *(f"{one[key]:.2f}" for key in ("ms", "over_greedy_ms", "cpu_ms"))) for one in results),
    )
    output.json(
        {
            "bench": "sampling",
            "machine": machine.to_json(),
            "rows": rows,
            "vocabulary": vocabulary,
            "threads": threads,
            "results": results,
        }
    )


def _wishes(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Sampling parameters by what they are called in the table; the last has all of them."""
    drawn = random.Random(0)
    biased = drawn.sample(range(vocabulary), min(1024, vocabulary))
    single: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 2.0},
        "top_p": {"temperature": 2.0, "top_p": 0.9999},
        "top_k": {"temperature": 2.0, "top_k": vocabulary * 5 // 8},
        "min_p": {"temperature": 2.0, "min_p": 1e-6},
        "logit_bias": {"logit_bias": tuple((i, drawn.uniform(-3, 3)) for i in biased)},
        "repetition_penalty": {"repetition_penalty": 1.3},
        "presence_penalty": {"presence_penalty": 1.0, "frequency_penalty": 0.1},
        "min_tokens": {"min_tokens": 10**6, "stop_token_ids": tuple(range(3, 67))},
        "logprobs": {"logprobs": 20},
    }
    return single | {"all": {name: value for fields in single.values() for name, value in fields.items()}}


def _sequences(rows: int, vocabulary: int, fields: dict[str, Any]) -> list[Sequence]:
    """With 6,000 tokens each, a third of them generated."""
    drawn = random.Random(1)
    prompt = tuple(drawn.choices(range(3, vocabulary), k=4000))
    generated = tuple(drawn.choices(range(3, vocabulary), k=2000))
    sampling = {"temperature": 0.0, **fields}
    return [
        Sequence(
            Request(
                request_id=f"{row}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=10**6, **sampling),
                output_token_ids=generated,
                seed=0,
                choice_index=row,
            )
        )
        for row in range(rows)
    ]
