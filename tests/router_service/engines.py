"""Builds engines for tests: a checkpoint on disk, experts in this process, results collected by request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cluster.checkpoint.architecture import ComputeDtype, compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.config import EngineConfig
from cluster.errors import MantaError
from cluster.messages import Embedding, Grammar, Key, Request, TokenChunk
from cluster.planning.placement import ExpertGroup
from experts_service.carriers.local import LocalTransport
from experts_service.kernels.kernel import Kernel
from experts_service.loaded_experts import load_experts
from router_service.assembly import build_engine
from router_service.dispatcher import Dispatcher
from router_service.engine import Engine, Event
from router_service.grammar.grammar import GrammarState
from router_service.grammar.structural_tags.format import structural_tag
from router_service.grammar.vocabulary import GrammarVocabulary, compile_tag, new_compiler
from router_service.grammar.workers import GrammarWorkers
from router_service.scheduling.sequence import Sequence

WORKERS = GrammarWorkers(token_timeout_s=1.0)


def follow(state: GrammarState, token_ids: Iterable[int]) -> None:
    """Go on by these tokens, as far as the grammar goes."""
    for token_id in token_ids:
        state.accept(token_id)
        if not state.is_ready(timeout_s=60.0):
            break


class Bench:
    """An engine without a thread, and what it delivered. `run` steps it until every request has ended.

    Experts are in this process, unless a `dispatcher` is given.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_groups: int = 1,
        device: str = "cpu",
        model_impl: Literal["auto", "native", "transformers"] = "auto",
        dispatcher: Dispatcher | None = None,
        **config: Any,
    ) -> None:
        tiny = {"num_kv_blocks": 64, "max_model_len": 512, "num_threads": 1}
        settings = EngineConfig(**{**tiny, "device": device, **config})
        checkpoint = open_checkpoint(directory, model_impl).rounded(settings.rounding)
        kernel = None if settings.kernels == "auto" else Kernel(settings.kernels)
        dispatcher = dispatcher or local_dispatcher(checkpoint, num_groups, device, kernel, settings.dtype)
        self.engine: Engine = build_engine(checkpoint, settings, dispatcher, self._collect)
        architecture = checkpoint.architecture
        self.vocabulary = GrammarVocabulary(
            str(directory), checkpoint.layout, architecture.vocab_size, architecture.eos_token_ids
        )
        self.grammars: dict[Grammar, Any] = {}
        self.chunks: dict[Key, list[TokenChunk]] = defaultdict(list)
        self.embeddings: dict[Key, torch.Tensor] = {}
        self.errors: dict[Key, MantaError] = {}

    def _collect(self, events: list[Event]) -> None:
        for key, item in events:
            if isinstance(item, MantaError):
                self.errors[key] = item
            elif isinstance(item, Embedding):
                self.embeddings[key] = torch.frombuffer(bytearray(item.values), dtype=torch.float32)
            else:
                self.chunks[key].append(item)

    def add(self, *requests: Request) -> None:
        """Queue requests; the next step sees them."""
        for request in requests:
            self.engine._add(Sequence(request, self.grammar_state(request)))

    def grammar_state(self, request: Request) -> GrammarState | None:
        """Compiled here and now; the directory must have a tokenizer."""
        if request.grammar is None:
            return None
        if request.grammar not in self.grammars:
            compiler = new_compiler(self.vocabulary.tokenizer_info())
            self.grammars[request.grammar] = compile_tag(compiler, structural_tag(request.grammar))
        return GrammarState(self.grammars[request.grammar], request, WORKERS)

    def run(self, *requests: Request) -> list[list[int]]:
        """Add the requests and step until the engine is idle. Returns the output token ids of each."""
        self.add(*requests)
        while self.engine._sequences:
            self.engine.step()
        return [self.token_ids(request) for request in requests]

    def token_ids(self, request: Request) -> list[int]:
        return [token for chunk in self.chunks[request.key] for token in chunk.token_ids]

    def one_by_one(self, *requests: Request) -> list[list[int]]:
        return [self.run(request)[0] for request in requests]


def local_dispatcher(
    checkpoint: Checkpoint,
    num_groups: int,
    device: str,
    kernel: Kernel | None = None,
    of_config: Literal["auto"] | ComputeDtype = "auto",
) -> Dispatcher:
    """Experts of a checkpoint in this process, packed into `num_groups` groups; a dense model has none."""
    architecture = checkpoint.architecture
    if architecture.is_dense:
        return Dispatcher((), LocalTransport({}))
    dtype = getattr(torch, compute_dtype(of_config, architecture))
    size = architecture.num_experts // num_groups
    groups = [ExpertGroup(g, tuple(range(g * size, (g + 1) * size))) for g in range(num_groups)]
    loaded = {
        group.index: load_experts(checkpoint, group.experts, dtype=dtype, device=torch.device(device), kernel=kernel)
        for group in groups
    }
    return Dispatcher(groups, LocalTransport(loaded))


# Settings that cut the same work in other ways; what comes out may not depend on any of them.
CUTS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunked-prefill": {"max_num_batched_tokens": 17},
    "token-by-token": {"max_num_batched_tokens": 1},
    "preempted": {"num_kv_blocks": 34, "block_size": 16},
    "preempted-in-chunks": {"num_kv_blocks": 34, "block_size": 16, "max_num_batched_tokens": 64},
    "blocks-of-one": {"block_size": 1, "num_kv_blocks": 2048},
    "one-at-a-time": {"max_num_seqs": 1},
    "three-at-a-time": {"max_num_seqs": 3},
    "prefix-caching": {"prefix_caching": True},
    "two-microbatches": {"microbatches": 2},
    "three-microbatches": {"microbatches": 3, "max_num_batched_tokens": 40},
    "ahead": {"async_scheduling": "on"},
    "ahead-preempted": {"async_scheduling": "on", "num_kv_blocks": 34, "block_size": 16},
    "four-groups": {"num_groups": 4},
    "eight-groups": {"num_groups": 8},
}


def cut_by(*names: str) -> Any:
    """Runs a test with `config` set in each of these ways."""
    return pytest.mark.parametrize("config", [pytest.param(CUTS[name], id=name) for name in names])
