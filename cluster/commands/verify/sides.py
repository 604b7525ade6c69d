"""What either side says of the same prompts: tokens, how likely each was, and what went through each layer.

Of a layer two things are noted, which every implementation has: what attention gave to its output projection, and which
experts each token was sent to; of the first prompt, its parts as well. Ours is an engine with all experts in this
process; theirs is read once more over the tokens that ours chose.

Shapes: T tokens of a prompt, N query heads, W width of a value's head, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from math import nan
from typing import Any

import torch
from torch import nn

from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.json_document import JsonDocument
from cluster.commands.doctor.model import generate
from cluster.commands.verify.gates import AskedGate, Routed
from cluster.commands.verify.parts import PartDifference, Parts, PartsOfOurs, compare
from cluster.errors import Unavailable
from cluster.messages import TokenChunk
from experts_service.transformers_backend.meta_model import layers_of
from experts_service.transformers_backend.probe import is_experts
from router_service.engine import Engine
from router_service.model.transformers_backend.decoder import DispatchedExperts, TransformersDecoder


@dataclass
class Layers:
    """Of one prompt, by the layer's index."""

    attended: dict[int, torch.Tensor] = field(default_factory=dict)  # [T, N · W]
    experts: dict[int, torch.Tensor] = field(default_factory=dict)  # [T, K], ascending


@dataclass
class Said:
    """Of one prompt."""

    token_ids: list[int]
    logprobs: list[float]
    layers: Layers
    routed: list[Routed]  # of each layer that has experts, all tokens that were fed
    error: str = ""  # why there are no tokens


class _Notes:
    """What goes through the layers of an engine in the first step of a prompt that is alone."""

    def __init__(self) -> None:
        self.attended: dict[int, torch.Tensor] = {}
        self.parts = Parts()
        self._steps: list[list[Routed]] = []  # of each, where its tokens went, by layer
        self._ours: PartsOfOurs | None = None
        self._is_open = True

    def take_over(self, engine: Engine) -> None:
        """Before it starts."""
        runner = engine.model_runner
        plan_of, forward, decode = runner.attention.plan, runner.forward, runner.decoder.forward
        ours = self._ours = PartsOfOurs(runner.decoder)
        weighed: list[torch.Tensor] = []  # by layer, of a step
        self.parts = ours.parts

        def noted_plan(metadata: Any) -> Any:
            plan = plan_of(metadata)
            read = plan.read

            def noted_read(layer: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
                output = read(layer, *arguments, **keywords)
                self._note_attended(layer, output.flatten(1))
                return output

            plan.read = noted_read  # type: ignore[method-assign]
            return plan

        def noted_forward(batch: Any) -> Any:
            try:
                return forward(batch)
            finally:
                if self._is_open:
                    ours.close()
                self._is_open = False

        def noted_decode(ids: Any, positions: Any, attention: Any, kv_cache: Any, routed: Any = None) -> Any:
            chosen = [] if routed is None else routed
            weighed.clear()
            output = yield from decode(ids, positions, attention, kv_cache, chosen)
            # Code of ours tells no weights: they are scores' softmax, and do not leap.
            weights = weighed or [torch.full_like(experts, nan, dtype=torch.float32) for experts in chosen]
            self._steps.append([Routed(*pair) for pair in zip(map(torch.Tensor.cpu, chosen), weights, strict=True)])
            return output

        runner.decoder.forward = noted_decode  # type: ignore[method-assign, assignment]
        if isinstance(runner.decoder, TransformersDecoder):  # some change what attention gave before they project it
            _note_projected(layers_of(runner.decoder.model), self._note_attended)
            for module in runner.decoder.model.modules():
                if isinstance(module, DispatchedExperts):
                    module.register_forward_pre_hook(lambda _, arguments: weighed.append(arguments[2].float().cpu()))
        else:
            runner.attention.plan = noted_plan  # type: ignore[method-assign]
        runner.forward = noted_forward  # type: ignore[method-assign]

    def _note_attended(self, layer: int, rows: torch.Tensor) -> None:
        if self._is_open:
            self.attended[layer] = rows.float().cpu()

    def ask_experts(self, engine: Engine) -> None:
        """When it has answered."""
        assert self._ours is not None, "it was taken over"
        self._ours.ask_experts(engine.model_runner.decoder.dispatcher)

    @property
    def layers(self) -> Layers:
        """What was noted of them."""
        experts = {layer: chosen.experts.sort(1).values for layer, chosen in self.parts.chosen.items()}
        return Layers(self.attended, experts)

    @property
    def routed(self) -> list[Routed]:
        """Where the tokens of all steps went."""
        return [
            Routed(torch.cat([one.experts for one in of_layer]), torch.cat([one.weights for one in of_layer]))
            for of_layer in zip(*self._steps, strict=True)
        ]


def ours(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[list[Said], Parts]:
    """Each prompt alone, greedily; and the parts of the first."""
    said = []
    parts: Parts | None = None
    for prompt in prompts:
        notes, error = _Notes(), ""
        chunks: list[TokenChunk] = []
        try:
            [chunks] = generate(
                checkpoint,
                device,
                dtype,
                [prompt],
                prepare=notes.take_over,
                look=notes.ask_experts if parts is None else lambda _: None,
                cuda_graphs="off",
                output_tokens=tokens,
            )
        except Unavailable as raised:  # of numbers that are not finite
            error = str(raised)
        parts = parts or notes.parts
        said.append(
            Said(
                [token for chunk in chunks for token in chunk.token_ids],
                [one.token_logprob for chunk in chunks for one in chunk.logprobs or ()],
                notes.layers,
                notes.routed,
                error,
            )
        )
    assert parts is not None, "there are prompts"
    return said, parts


class Reference:
    """The model as transformers has it."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoModelForMultimodalLM,
        )
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
        options = _plain(checkpoint)
        sees = type(config) not in AutoModelForCausalLM._model_mapping
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        if hasattr(config, "thinker_config"):  # Qwen3-Omni: what speaks is left out
            config.enable_audio_output = False
            auto, options = AutoModelForMultimodalLM, options | {"config": config}
        model: Any = auto.from_pretrained(
            checkpoint.directory, dtype=dtype, trust_remote_code=False, local_files_only=True, **options
        )
        self._model: Any = getattr(model, "thinker", model)
        self._model.to(device).eval()
        self._layers = Layers()
        self._routed: Iterator[Routed] = iter(())  # what each layer that has experts is to follow
        self._near_ties = 0
        layers = layers_of(self._model)
        _note_projected(layers, self._note_attended)
        for name, module in layers.named_modules():
            if is_experts(module) and len(signature(module.forward).parameters) > 1:
                block = layers.get_submodule(name.rpartition(".")[0])
                gate = AskedGate(block, module, str(dtype).removeprefix("torch."))
                self._follow(int(name.split(".")[1]), module, gate)

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], said: Said) -> tuple[torch.Tensor, Layers, int]:
        """Log-probabilities [T, V] of what comes at the place of each token that was said, the layers of the prompt,
        and how often a token was sent where ours was because a gate nearly tied.
        """
        self._layers, self._routed, self._near_ties = Layers(), iter(said.routed), 0
        ids = torch.tensor([[*prompt, *said.token_ids]], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        of_prompt = slice(None, len(prompt))
        layers = Layers(
            {layer: rows[of_prompt] for layer, rows in self._layers.attended.items()},
            {layer: rows[of_prompt] for layer, rows in self._layers.experts.items()},
        )
        return logits.float().log_softmax(-1).cpu(), layers, self._near_ties

    def compare(self, parts: Parts, dtype: str) -> tuple[PartDifference, ...]:
        """Parts of ours that differ from those of it."""
        return compare(parts, self._model, dtype)

    def _note_attended(self, layer: int, rows: torch.Tensor) -> None:
        self._layers.attended[layer] = rows.float().cpu()

    def _follow(self, layer: int, experts: nn.Module, gate: AskedGate) -> None:
        given: list[torch.Tensor] = []  # to the gate

        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            given[:] = arguments[:1]

        def follow(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rows, chosen, weights, *others = arguments
            routed = next(self._routed, None)
            if routed is not None and gate.can_be_asked and routed.experts.shape[1] == chosen.shape[1]:
                count = len(routed.experts)  # the last token was said, and not fed
                of_gate = given[0].reshape(len(chosen), -1)[:count]
                followed, ties = gate.follow(of_gate, Routed(chosen[:count], weights[:count]), routed)
                chosen = torch.cat([followed.experts, chosen[count:]])
                weights = torch.cat([followed.weights, weights[count:]])
                self._near_ties += ties
            self._layers.experts[layer] = chosen.sort(1).values.cpu()
            return rows, chosen, weights, *others

        gate.module.register_forward_pre_hook(note)
        experts.register_forward_pre_hook(follow)


def _note_projected(layers: nn.Module, note: Callable[[int, torch.Tensor], None]) -> None:
    """Hands to `note`, of each layer by its index, what attention's output projection gets [T, N · W]."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, arguments: note(layer, arguments[0].reshape(-1, arguments[0].shape[-1]))

    for module in layers.modules():
        layer, projection = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
        if isinstance(layer, int) and isinstance(projection, nn.Module):
            projection.register_forward_pre_hook(hook(layer))


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Has transformers widen what we widen; it would multiply some formats as they are on a GPU."""
    from transformers import FineGrainedFP8Config, Mxfp4Config

    config = JsonDocument.read(checkpoint.directory / "config.json")
    if not checkpoint.widened or not config.has("quantization_config"):
        return {}
    method = config.section("quantization_config").values.get("quant_method")
    plain: dict[object, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return {"quantization_config": plain[method](dequantize=True)} if method in plain else {}
