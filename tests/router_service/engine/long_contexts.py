"""Engines for tests of long contexts: what the sequences have before the first step is in the cache, uncomputed."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.commands.bench.decode.context import Contexts
from cluster.commands.bench.decode.figures import Workload
from cluster.commands.bench.decode.setup import config_for, even_groups
from cluster.planning.placement import kv_bytes_per_token
from experts_service.carriers.local import LocalTransport
from experts_service.kernels.experts import Experts
from router_service.assembly import build_engine
from router_service.dispatcher import Dispatcher
from tests.router_service.requests import make_sequence


class LongContexts:
    """Decoding sequences of one length, stepped by hand. Nobody keeps what they generate."""

    def __init__(self, directory: Path, workload: Workload, num_threads: int | None = None) -> None:
        checkpoint = open_checkpoint(directory)
        architecture = checkpoint.architecture
        groups = even_groups(architecture, "local", None)
        config = config_for(checkpoint, groups, [workload]).engine.model_copy(update={"num_threads": num_threads})
        dtype_name = compute_dtype(config.dtype, architecture)
        experts = {
            group.index: Experts.load(
                checkpoint, group.experts, dtype=getattr(torch, dtype_name), device=torch.device("cpu")
            )
            for group in groups
        }
        dispatcher = Dispatcher(groups, LocalTransport(experts))
        self.engine = build_engine(checkpoint, config, dispatcher, lambda _: None)
        self.bytes_of_step = workload.num_sequences * kv_bytes_per_token(architecture, dtype_name)  # keys and values
        prompts = workload.prompts(architecture.vocab_size)
        Contexts(self.engine).fill(prompts)
        for prompt in prompts:
            self.engine._add(make_sequence(prompt, max_tokens=workload.output_tokens, ignore_eos=True))

    def resident_bytes(self, num_steps: int, every: int) -> list[int]:
        """Take so many steps. What the process has resident, now and then, without what they wrote to the cache."""
        process, readings = psutil.Process(), []
        for step in range(num_steps):
            self.engine.step()
            if step % every == 0:
                readings.append(process.memory_info().rss - step * self.bytes_of_step)
        return readings
