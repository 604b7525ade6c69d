"""A model of transformers without its weights, and where its experts are in it. Reads config.json and nothing else.

No code of a checkpoint is ever run: families that the installed transformers does not have are refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging as transformers_logging

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from experts_service.transformers_backend.layer_attention import LayerAttention
from experts_service.transformers_backend.probe import (
    ATTENTION,
    NO_MODEL,
    Refuse,
    check_rope,
    first_line,
    is_experts,
    probe,
)

SCALED_BEFORE = "Llama4TextMoe"  # weighs rows before its experts, which are not behind the experts interface

COUNTS_ROWS = "Llama4TextAttention"  # takes positions from how many tokens a cache holds, and not from `position_ids`

transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class MetaModel:
    """A causal language model of which no number is there yet."""

    model: Any  # PreTrainedModel
    layers: Any  # from ids to the last hidden states
    head: Any  # from these, as `inputs_embeds`, to logits
    experts: tuple[tuple[str, nn.Module], ...]  # of each layer that has some, in order, by their names in the model
    attention: tuple[LayerAttention, ...]  # by the cache's layers
    directory: Path

    @property
    def model_type(self) -> str:
        """The family."""
        return str(self.model.config.model_type)

    def error(self, problem: str) -> CheckpointError:
        """That it cannot be served, for the caller to raise."""
        return refusal(self.directory, self.model_type, problem)


def refusal(directory: Path, model_type: str, problem: str) -> CheckpointError:
    """Why a family cannot be served by the transformers backend."""
    return CheckpointError(f"{directory}: the transformers backend cannot serve {model_type}: {problem}.")


def build(directory: Path, architecture: Architecture, dtype: torch.dtype) -> MetaModel:
    """The text model of a checkpoint on the meta device, in `dtype`. Raises CheckpointError by the family's name."""
    config = _text_config(directory)
    AttentionInterface.register(ATTENTION, attend)
    config._experts_implementation = "eager"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except NO_MODEL as error:
        raise refusal(directory, config.model_type, first_line(error)) from error
    model.eval()
    experts = tuple((name, module) for name, module in model.named_modules() if is_experts(module))
    refuse = partial(refusal, directory, config.model_type)
    if not experts and architecture.num_experts:
        raise refuse("its experts are not behind transformers' experts interface")
    for name, module in experts:
        if module.num_experts != architecture.num_experts:
            raise refuse(f"{name} has {module.num_experts} experts, and config.json says {architecture.num_experts}")
    layers, head = _parted(model, refuse)
    return MetaModel(model, layers, head, experts, probe(model, layers, head, refuse), directory)


def check(checkpoint: Checkpoint, max_model_len: int | None) -> None:
    """Raises CheckpointError where it cannot be served, by name. Reads no weight."""
    architecture = checkpoint.architecture
    meta = build(checkpoint.directory, architecture, torch.float32)
    check_rope(meta.model.config, max_model_len or architecture.max_position_embeddings, meta.error)


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function of every model of ours: what the coordinator has put into its modules."""
    attention: Any = module.manta_attention
    output: tuple[torch.Tensor, None] = attention(module, *args, **kwargs)
    return output


def _text_config(directory: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except NO_MODEL as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is of no model that the installed transformers can build, and Manta runs no "
            f"remote code: {first_line(error)}."
        ) from error
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        part.__dict__.pop("quantization_config", None)  # what it is given is plain
    if type(text) not in AutoModelForCausalLM._model_mapping:
        raise refusal(directory, config.model_type, "transformers has no causal language model over text alone for it")
    return text


class _Given(nn.Module):
    """In place of the layers: what they made is there already."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _parted(model: Any, refuse: Refuse) -> tuple[Any, Any]:
    """Its layers, and the model without them: what it does between the last of them and logits is its own code."""
    layers = next((module for module in model.children() if hasattr(module, "layers")), None)
    if layers is None:
        raise refuse("its layers cannot be told from its head")
    head = copy.copy(model)
    head._modules = {name: _Given() if module is layers else module for name, module in model._modules.items()}
    return layers, head
