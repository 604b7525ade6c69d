"""Checks of each kind of kernel by itself, as a model of this machine would have it chosen, beside fp32 on the CPU.

What they are given is the same on every machine. Tolerances are of the largest number that is expected: bf16 has 8
bits, and a product of a few hundred terms is rounded at least twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.known_models import MIXTRAL_8X7B
from cluster.checkpoint.quantization.rounding import Numbers, Rounding
from cluster.commands.doctor.checks import Check, Finding, failed, good
from cluster.messages import Request, SamplingParams
from experts_service.kernels.experts import Experts, expert_tensor_names
from experts_service.quantization.rounding import rounded
from experts_service.quantization.weight import Weight, dense
from router_service.attention.choice import attention_backend
from router_service.attention.kv_cache import KVCache
from router_service.attention.metadata import AttentionMetadata, Span
from router_service.sampling.sampler import Sampler
from router_service.scheduling.sequence import Sequence as Generated

TOLERANCE = 2.0**-6  # of bf16, beside fp32
FORMATS: tuple[Numbers, ...] = ("int8", "int4", "fp8")  # beside bf16
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 256, 512
COUNTS = ((1, 0, 0, 0, 0, 1, 0, 0), (3, 0, 40, 1, 0, 0, 17, 3), (64, 64, 64, 64, 64, 64, 64, 64))  # rows of each expert
BLOCK_SIZE = 16
HEADS = ((4, 2, 32, None), (32, 8, 128, None), (8, 8, 64, 24))  # query and key-value heads, their width, window
CONTEXTS = (1, 15, 16, 17, 100, 700)  # tokens, the new ones among them
WISHES = (
    SamplingParams(9, temperature=0.0),
    SamplingParams(9, temperature=1.0),
    SamplingParams(9, temperature=0.7, top_p=0.8),
    SamplingParams(9, temperature=1.3, top_k=20),
    SamplingParams(9, temperature=1.0, min_p=0.05),
    SamplingParams(9, temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5),
    SamplingParams(9, temperature=1.0, logit_bias=((3, 5.0), (7, -100.0))),
)
VOCABULARY = 2048
NOT_WHAT_IT_SHOULD = "serve nothing there, and report it with what `manta doctor --json` prints"


def checks(device: torch.device) -> tuple[Check, ...]:
    """Of one device."""
    return (
        Check(
            f"experts on {device}",
            "Rows are multiplied with the experts that they go to, together, one by one, and in each format.",
            lambda: experts(device),
        ),
        Check(
            f"attention on {device}",
            "Prompts, decoding and windows over pages of the cache, in a grid of shapes.",
            lambda: attention(device),
        ),
        Check(
            f"sampler on {device}",
            "The tokens that are drawn are those of the CPU, whatever is wished.",
            lambda: sampler(device),
        ),
        Check(
            f"grammar mask on {device}",
            "No token comes that a grammar rules out.",
            lambda: mask(device),
        ),
    )


@torch.inference_mode()
def experts(device: torch.device) -> Finding:
    """As loaded, together and one by one, and in each format, beside the formula in fp32 on what the format holds."""
    torch.manual_seed(0)
    weights = _experts()
    worst = {}
    for format_, held in [("bf16", weights), *((format_, _rounded(weights, format_)) for format_ in FORMATS)]:
        plain = {name: dense(weight).float() for name, weight in held.items()}
        there = {name: weight.to(device) for name, weight in held.items()}
        ways = {format_: Experts(range(NUM_EXPERTS), [there])}
        if format_ == "bf16":
            ways["bf16 one by one"] = Experts(range(NUM_EXPERTS), [there], grouped=False)
        for name, way in ways.items():
            worst[name] = 0.0
            for counts in COUNTS:
                rows = _random(sum(counts), HIDDEN)
                expected = torch.cat([_expert(part, plain, expert) for expert, part in enumerate(rows.split(counts))])
                got = way(0, rows.to(device), counts).cpu()
                worst[name] = max(worst[name], _difference(got, expected))
    return _within(worst, TOLERANCE)


def _experts() -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for expert in range(NUM_EXPERTS):
        w1, w2, w3 = expert_tensor_names(0, expert)
        weights[w1] = _random(INTERMEDIATE, HIDDEN) / HIDDEN**0.5
        weights[w2] = _random(HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5
        weights[w3] = _random(INTERMEDIATE, HIDDEN) / HIDDEN**0.5
    return weights


def _rounded(weights: Mapping[str, Weight], format_: Numbers) -> dict[str, Weight]:
    scheme = Rounding.to(format_, 128, "experts").scheme
    return {name: rounded(dense(weight), scheme, torch.bfloat16) for name, weight in weights.items()}


def _expert(rows: torch.Tensor, weights: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
    """The formula, in fp32."""
    w1, w2, w3 = (weights[name] for name in expert_tensor_names(0, expert))
    x = rows.float()
    return (F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()


@torch.inference_mode()
def attention(device: torch.device) -> Finding:
    """What is chosen there for bf16, beside softmax over all positions in fp32."""
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    number = 0
    for heads, kv_heads, head_dim, window in HEADS:
        architecture = replace(
            MIXTRAL_8X7B, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, sliding_window=window
        )
        backend = attention_backend(architecture, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=device)
        cache = KVCache(
            1,
            sum(-(-context // BLOCK_SIZE) for context in CONTEXTS),
            backend.layout,
            dtype=torch.bfloat16,
            device=device,
        )
        sequences = list(_sequences(architecture))
        for before in (0, -1, -9):  # a whole prompt; then its last token; then its last nine, once more
            spans = [_span(one, before) for one in sequences]
            asked = [slice(span.start, span.end) for span in spans]
            queries, keys, values = (
                torch.cat([tensor[part] for tensor, part in zip(of_all, asked, strict=True)]).to(device)
                for of_all in zip(*((one.queries, one.keys, one.values) for one in sequences), strict=True)
            )
            plan = backend.plan(AttentionMetadata(spans, BLOCK_SIZE))
            got = plan.attend(0, queries, keys, values, cache).cpu()
            expected = torch.cat([one.expected(window)[part] for one, part in zip(sequences, asked, strict=True)])
            worst[backend.name] = max(worst.get(backend.name, 0.0), _difference(got, expected))
            number += len(spans)
    return _within(worst, TOLERANCE, f"{number} of ")


@dataclass(frozen=True)
class _Tokens:
    """Of one sequence."""

    queries: torch.Tensor  # [S, N, H]
    keys: torch.Tensor  # [S, G, H]
    values: torch.Tensor  # [S, G, H]
    blocks: array[int]

    def expected(self, window: int | None) -> torch.Tensor:
        """Attention of every position in fp32, by the formula."""
        length, heads, head_dim = self.queries.shape
        times = heads // self.keys.shape[1]
        keys, values = (x.float().repeat_interleave(times, dim=1) for x in (self.keys, self.values))
        scores = torch.einsum("qnh,knh->nqk", self.queries.float(), keys) / head_dim**0.5
        positions = torch.arange(length)
        seen = positions[None] <= positions[:, None]
        if window:
            seen &= positions[None] > positions[:, None] - window
        return torch.einsum("nqk,knh->qnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)


def _sequences(architecture: Architecture) -> Iterator[_Tokens]:
    """With blocks in no order."""
    free = list(range(1, 1 + sum(-(-context // BLOCK_SIZE) for context in CONTEXTS)))
    free = free[::2] + free[1::2]
    query_heads, kv_heads, head_dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
    for context in CONTEXTS:
        number = -(-context // BLOCK_SIZE)
        blocks, free = free[:number], free[number:]
        yield _Tokens(
            _random(context, query_heads, head_dim),
            _random(context, kv_heads, head_dim),
            _random(context, kv_heads, head_dim),
            array("i", blocks),
        )


def _span(tokens: _Tokens, before: int) -> Span:
    """All of its tokens, or so many of the last ones."""
    start = max(0, len(tokens.queries) + before) if before else 0
    return Span(start, len(tokens.queries) - start, tokens.blocks)


def sampler(device: torch.device) -> Finding:
    """Ids on the device and on the CPU, for the same numbers."""
    logits = torch.randn(len(WISHES) * 8, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    here, there = (_sampled(logits, of, None) for of in (torch.device("cpu"), device))
    other = sum(one != two for one, two in zip(here, there, strict=True))
    found = f"{len(here) - other} of {len(here)} tokens are the CPU's"
    return failed(found, NOT_WHAT_IT_SHOULD) if other else good(found)


def mask(device: torch.device) -> Finding:
    """Ids where one token in eight may come."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(WISHES) * 8, VOCABULARY, generator=generator) * 3
    allowed = torch.rand(VOCABULARY, generator=generator).numpy() < 1 / 8
    drawn = _sampled(logits, device, np.packbits(allowed, bitorder="little"))
    wrong = sum(not allowed[token] for token in drawn)
    here = _sampled(logits, torch.device("cpu"), np.packbits(allowed, bitorder="little"))
    found = f"{len(drawn) - wrong} of {len(drawn)} tokens may come, {sum(map(int.__eq__, drawn, here))} are the CPU's"
    return failed(found, NOT_WHAT_IT_SHOULD) if wrong or drawn != here else good(found)


@dataclass(frozen=True)
class _Mask:
    """What a grammar's state says to the sampler."""

    mask: np.ndarray
    error = None

    def is_ready(self, _timeout_s: float = 0.0) -> bool:
        return True


def _sampled(logits: torch.Tensor, device: torch.device, allowed: np.ndarray | None) -> list[int]:
    """A token for each row, eight rows for each wish."""
    sequences = []
    for number, (wish, seed) in enumerate(product(WISHES, range(8))):
        request = Request(str(number), (1, 2, 3), wish, seed, output_token_ids=(3, 5, 5))
        sequence = Generated(request)
        sequence.grammar = None if allowed is None else _Mask(allowed)  # type: ignore[assignment]
        sequences.append(sequence)
    token_ids, _ = Sampler(frozenset())(logits.to(device), sequences)
    return list(token_ids)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, of the largest number that is expected. NaN where there is one."""
    return float((got.float() - expected).abs().max() / expected.abs().max())


def _within(worst: dict[str, float], tolerance: float, shapes: str = "") -> Finding:
    told = "; ".join(f"{shapes}{name}: {difference:.2g} off at most" for name, difference in worst.items())
    if not all(difference <= tolerance for difference in worst.values()):
        return failed(f"{told}, and {tolerance:.2g} may be", NOT_WHAT_IT_SHOULD)
    return good(told)
