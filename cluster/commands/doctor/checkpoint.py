"""Checks of one model: that it can be read, and whether it fits what is here. Reads headers; loads no weight."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch

from cluster.checkpoint.architecture import compute_dtype
from cluster.checkpoint.checkpoint import Checkpoint, open_checkpoint
from cluster.checkpoint.hub import resolve_model
from cluster.commands.doctor.checks import Check, Finding, failed, good
from cluster.commands.doctor.container import memory_left
from cluster.deploy.app import check_tokenizer
from cluster.planning.placement import gib, kv_bytes_per_token
from cluster.planning.plan import USABLE
from cluster.planning.weights import held_weights

CPU_USABLE = 0.9  # of what is free: the rest is for steps and Python


class Model:
    """A directory or a hub id."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._opened: Checkpoint | None = None

    def checks(self) -> Iterator[Check]:
        """One that cannot be opened has no others. Each is run before the next is asked for."""
        yield Check("checkpoint", "Its files are whole, and of a family that is served.", self.opens)
        if self._opened is not None:
            yield Check("tokenizer", "Prompts and answers go through it.", self.has_tokenizer)
            yield Check("weights", "They are in memory, or on cards, before anything is answered.", self.fits)

    def opens(self) -> Finding:
        """What is in its headers. Raises MantaError."""
        self._opened = open_checkpoint(resolve_model(self._name, None))
        if self._opened.model_impl == "transformers":
            from experts_service.transformers_backend.meta_model import checked  # takes seconds to import

            self._opened = checked(self._opened, None)
        a = self._opened.architecture
        experts = "dense" if a.is_dense else f"{a.num_experts} experts, {a.top_k} for a token"
        return good(f"{self._opened.directory}: {a.num_layers} layers, {experts}")

    @property
    def _checkpoint(self) -> Checkpoint:
        assert self._opened is not None, "else these are not asked"
        return self._opened

    def has_tokenizer(self) -> Finding:
        """Beside the weights."""
        check_tokenizer(self._checkpoint)
        return good("it is there")

    def fits(self) -> Finding:
        """Weights and the keys and values of one sequence of the whole context, in the memory of all cards, or here."""
        checkpoint, a = self._checkpoint, self._checkpoint.architecture
        dtype = compute_dtype("auto", a)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = held_weights(checkpoint, dtype, device)
        needs = weights.coordinator + a.num_experts * weights.expert
        cache = a.max_position_embeddings * kv_bytes_per_token(a, dtype)
        if device == "cuda":
            cards = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
            room = int(USABLE * sum(cards))
            where = f"of {len(cards)} cards {gib(room)} may be used"
        else:
            free, of_container = psutil.virtual_memory().available, memory_left()
            room = int(CPU_USABLE * (free if of_container is None else min(free, of_container)))
            where = f"{gib(room)} of memory are left"
        found = f"{gib(needs)} of weights, {gib(cache)} for one sequence of {a.max_position_embeddings} tokens; {where}"
        if needs > room:
            return failed(
                found,
                f"manta plan {self._name} says which cards hold it, and with --ram what a card and memory hold; "
                "engine.quantization makes it smaller on CPUs",
            )
        if needs + cache > room:
            tokens = (room - needs) * a.max_position_embeddings // cache
            return failed(found, f"set engine.max_model_len, {tokens} at most")
        return good(found)
