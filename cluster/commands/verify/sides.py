"""What either side says of the same prompts: tokens, how likely each was, and what went through each layer.

Of a layer two things are noted, which every implementation has: what attention gave to its output projection, and which
experts each token was sent to. Ours is an engine with all experts in this process; theirs is read once more over the
tokens that ours chose.

Shapes: T tokens of a prompt, N query heads, W width of a value's head, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.json_document import JsonDocument
from cluster.commands.doctor.model import generate
from router_service.engine import Engine


@dataclass
class Layers:
    """Of one prompt, by the layer's index; experts by their index among layers that have some."""

    attended: dict[int, torch.Tensor] = field(default_factory=dict)  # [T, N · W]
    experts: dict[int, torch.Tensor] = field(default_factory=dict)  # [T, K], ascending


@dataclass
class Said:
    """Of one prompt."""

    token_ids: list[int]
    logprobs: list[float]
    layers: Layers


class _Notes:
    """What goes through the layers of an engine in the first step of a prompt that is alone."""

    def __init__(self) -> None:
        self.layers = Layers()
        self._is_open = True

    def take_over(self, engine: Engine) -> None:
        """Before it starts."""
        runner, dispatcher = engine.model_runner, engine.model_runner.decoder.dispatcher
        plan_of, forward, dispatch = runner.attention.plan, runner.forward, dispatcher.dispatch
        order: dict[int, int] = {}  # layer → its place among those with experts

        def noted_plan(metadata: Any) -> Any:
            plan = plan_of(metadata)
            read = plan.read

            def noted_read(layer: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
                output = read(layer, *arguments, **keywords)
                if self._is_open:
                    self.layers.attended[layer] = output.flatten(1).float().cpu()
                return output

            plan.read = noted_read  # type: ignore[method-assign]
            return plan

        def noted_dispatch(layer: int, rows: Any, experts: torch.Tensor, *arguments: Any) -> Any:
            if self._is_open:
                self.layers.experts[order.setdefault(layer, len(order))] = experts.sort(1).values.cpu()
            return dispatch(layer, rows, experts, *arguments)

        def noted_forward(batch: Any) -> Any:
            output = forward(batch)
            self._is_open = False
            return output

        runner.attention.plan = noted_plan  # type: ignore[method-assign]
        runner.forward = noted_forward  # type: ignore[method-assign]
        dispatcher.dispatch = noted_dispatch  # type: ignore[method-assign, assignment]


def ours(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, prompts: Sequence[Sequence[int]], tokens: int
) -> list[Said]:
    """Each prompt alone, greedily."""
    said = []
    for prompt in prompts:
        notes = _Notes()
        [chunks] = generate(
            checkpoint, device, dtype, [prompt], prepare=notes.take_over, cuda_graphs="off", output_tokens=tokens
        )
        said.append(
            Said(
                [token for chunk in chunks for token in chunk.token_ids],
                [one.token_logprob for chunk in chunks for one in chunk.logprobs or ()],
                notes.layers,
            )
        )
    return said


class Reference:
    """The model as transformers has it."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
        sees = type(config) not in AutoModelForCausalLM._model_mapping
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(
            checkpoint.directory, dtype=dtype, trust_remote_code=False, local_files_only=True, **_plain(checkpoint)
        )
        self._model.to(device).eval()
        self._layers = Layers()
        index = 0
        for module in self._model.modules():
            layer, projection = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
            if isinstance(layer, int) and isinstance(projection, nn.Module):
                projection.register_forward_pre_hook(self._note_attended(layer))
            if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
                module.register_forward_pre_hook(self._note_experts(index))
                index += 1

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], token_ids: Sequence[int]) -> tuple[torch.Tensor, Layers]:
        """Log-probabilities [T, V] of what comes at the place of each of `token_ids`, and the layers of the prompt."""
        self._layers = Layers()
        ids = torch.tensor([[*prompt, *token_ids]], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        of_prompt = slice(None, len(prompt))
        layers = Layers(
            {layer: rows[of_prompt] for layer, rows in self._layers.attended.items()},
            {layer: rows[of_prompt] for layer, rows in self._layers.experts.items()},
        )
        return logits.float().log_softmax(-1).cpu(), layers

    def _note_attended(self, layer: int) -> Any:
        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._layers.attended[layer] = arguments[0].reshape(-1, arguments[0].shape[-1]).float().cpu()

        return note

    def _note_experts(self, index: int) -> Any:
        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._layers.experts[index] = arguments[1].sort(1).values.cpu()

        return note


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Has transformers widen what we widen; it would multiply some formats as they are on a GPU."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    config = JsonDocument.read(checkpoint.directory / "config.json")
    if not checkpoint.widened or not config.has("quantization_config"):
        return {}
    method = config.section("quantization_config").values.get("quant_method")
    plain: dict[object, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return {"quantization_config": plain[method](dequantize=True)} if method in plain else {}
