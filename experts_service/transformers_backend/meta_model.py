"""A model of transformers without its weights, and where its experts are in it. Reads config.json and nothing else.

No code of a checkpoint is ever run: families that the installed transformers does not have are refused.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging as transformers_logging

from cluster.checkpoint.architecture import Architecture
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from experts_service.transformers_backend.layer_attention import LayerAttention, with_cache_of
from experts_service.transformers_backend.probe import (
    ATTENTION,
    NO_MODEL,
    Refuse,
    check_caches,
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

    model: Any  # PreTrainedModel; of one that also sees or hears, without what does
    config: Any  # of the text model
    layers: Any  # from ids to the last hidden states
    head: Any  # from these, as `inputs_embeds`, to logits
    experts: tuple[tuple[str, nn.Module], ...]  # of each layer that has some, in order, by their names in the model
    attention: tuple[LayerAttention, ...]  # by the cache's layers
    linears: tuple[nn.Linear, ...]  # that do nothing but multiply rows
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
    config, text, auto = _configs(directory)
    refuse = partial(refusal, directory, config.model_type)
    AttentionInterface.register(ATTENTION, attend)
    config._experts_implementation = text._experts_implementation = "eager"
    # What sees or hears is built as it is, and taken out afterwards: some of it knows no attention but transformers'.
    attention = {"": ATTENTION}
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:
            attention[name] = ATTENTION if part.get_text_config(decoder=True) is text else "eager"
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except NO_MODEL as error:
        check_caches(text, refuse)  # which says more, where it is that
        raise refuse(first_line(error)) from error
    model.eval()
    layers, head = _parted(model, refuse)
    experts = tuple((name, module) for name, module in model.named_modules() if is_experts(module))
    if not experts and architecture.num_experts:
        raise refuse("its experts are not behind transformers' experts interface")
    for name, module in experts:
        if module.num_experts != architecture.num_experts:
            raise refuse(f"{name} has {module.num_experts} experts, and config.json says {architecture.num_experts}")
    of_layers, linears = probe(model, text, layers, head, refuse)
    return MetaModel(model, text, layers, head, experts, of_layers, linears, directory)


def checked(checkpoint: Checkpoint, max_model_len: int | None) -> Checkpoint:
    """The same, keys and values being as wide as the model's own layers have them. Reads no weight.

    Raises CheckpointError where it cannot be served, by name.
    """
    architecture = checkpoint.architecture
    meta = build(checkpoint.directory, architecture, torch.float32)
    check_rope(meta.config, max_model_len or architecture.max_position_embeddings, meta.error)
    return replace(checkpoint, architecture=with_cache_of(architecture, meta.attention))


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function of every model of ours: what the coordinator has put into its modules."""
    attention: Any = module.manta_attention
    output: tuple[torch.Tensor, None] = attention(module, *args, **kwargs)
    return output


def _configs(directory: Path) -> tuple[Any, Any, Any]:
    """Of what is built and of the text model, which mostly is that, and what builds it."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except NO_MODEL as error:
        raise CheckpointError(
            f"{directory / 'config.json'} is of no model that the installed transformers can build, and Manta runs no "
            f"remote code: {first_line(error)}."
        ) from error
    config = getattr(config, "thinker_config", config)  # of Qwen3-Omni, beside a talker
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        part.__dict__.pop("quantization_config", None)  # what it is given is plain
    # The last: its text model has no head of its own.
    ways = (text, AutoModelForCausalLM), (text, AutoModelForImageTextToText), (config, AutoModelForImageTextToText)
    for built, auto in ways:
        if type(built) in auto._model_mapping:
            if not issubclass(auto._model_mapping[type(built)], GenerationMixin):
                break
            return built, text, auto
    problem = "transformers has no model for it that writes text one token after the other"
    raise refusal(directory, config.model_type, problem)


class _Outcome(MoeModelOutputWithPast):  # type: ignore[misc]
    """What layers make. Heads ask for more than that, and hand it on."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """In place of the layers: what they made is there already."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> MoeModelOutputWithPast:
        return _Outcome(last_hidden_state=inputs_embeds)


def _parted(model: Any, refuse: Refuse) -> tuple[Any, Any]:
    """Its layers, and the model without them: what it does between the last of them and logits is its own code.

    What sees or hears beside the layers is taken out of the model.
    """
    outer = next(((name, module) for name, module in model.named_children() if _layers_in(module) is not None), None)
    if outer is None:
        raise refuse("its layers cannot be told from its head")
    layers = _layers_in(outer[1])
    if layers is not outer[1]:
        for name, module in list(outer[1].named_children()):
            if module is not layers:
                delattr(outer[1], name)
    head = copy.copy(model)
    head._modules = {**model._modules, outer[0]: _Given()}
    return layers, head


def layers_of(model: nn.Module) -> Any:
    """The decoder in a model that has a head as well; None: it cannot be told from that."""
    return next((layers for module in model.children() if (layers := _layers_in(module)) is not None), None)


def _layers_in(module: nn.Module) -> Any:
    """The decoder: the module itself, or the text model in it."""
    if hasattr(module, "layers"):
        return module
    text = getattr(module, "language_model", None)
    return text if hasattr(text, "layers") else None
