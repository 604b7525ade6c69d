"""The parts of a model one by one: what ours made of their input, and what transformers' make of the same input.

A fault is seen where it is and nowhere after it, since no part is given what another computed wrongly. Experts are
asked about the same few rows, all of a layer, whether or not the prompt's tokens go to them; embeddings are compared of
all tokens. A part is named as transformers has it in the decoder, such as `layers.2.mlp.gate`.

Shapes: T tokens of a prompt, R rows, D hidden size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from cluster.commands.verify.gates import AskedGate, Routed
from experts_service.transformers_backend.meta_model import layers_of
from experts_service.transformers_backend.probe import is_experts
from router_service.dispatcher import Dispatcher
from router_service.model.decoder import Decoder, shared_expert_scores
from router_service.model.transformers_backend.decoder import DispatchedExperts, TransformersDecoder

ROWS = 4  # that each expert is asked about
SHOWN_EXPERTS = 16  # of a layer, in one line
TOKENS = 4096  # that are embedded at once
HEAD = "lm_head"
EMBEDDINGS = "embed_tokens"
NORM = "norm"  # after all layers
GATE = "gate"
OFF = {"float32": 1e-3, "bfloat16": 0.05}  # relative to the largest number of what transformers makes

_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class Call:
    """Of a part, the first one. What it was given and what it made are copies."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any

    @property
    def is_finite(self) -> bool:
        """What it was given."""
        return all(bool(one.isfinite().all()) for one in _numbers((self.arguments, self.keywords)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where the gate of a layer sent rows."""

    name: str | None  # of the experts in the decoder; None: the layer has no others
    rows: torch.Tensor  # [T, D]
    experts: torch.Tensor  # [T, K]
    weights: torch.Tensor  # [T, K]


@dataclass
class Parts:
    """What ours made of one prompt."""

    calls: dict[str, Call] = field(default_factory=dict)  # in the order in which they ended
    chosen: dict[int, Chosen] = field(default_factory=dict)  # by layer
    # By layer: the rows [R, D] that its experts were asked about, and what they said [E, R, D].
    asked: dict[int, torch.Tensor] = field(default_factory=dict)
    answers: dict[int, torch.Tensor] = field(default_factory=dict)
    embeddings: torch.Tensor | None = None  # [V, D]


@dataclass(frozen=True, slots=True)
class PartDifference:
    """Of one part, by more than rounding."""

    layer: int | None  # None: it is in none
    part: str
    expert: int | None  # of the layer's
    # The largest difference, relative to the largest number; of GATE the part of the tokens that go to other experts.
    # None: it makes numbers that are not finite,
    off: float | None
    here: bool  # in our code,
    there: bool  # or in transformers'


class PartsOfOurs:
    """Notes the parts of an engine's decoder in a step, and asks its experts afterwards."""

    def __init__(self, decoder: Decoder | TransformersDecoder) -> None:
        self.parts = Parts()
        self._decoder = decoder
        self._dispatched: dict[int, int] = {}  # layer → what the dispatcher calls it
        self._undo: list[Callable[[], object]] = []
        if isinstance(decoder, Decoder):
            self._note_native(decoder)
        else:
            self._note_modules(decoder)

    def close(self) -> None:
        """Of the next step nothing is noted."""
        for undo in self._undo:
            undo()

    @torch.inference_mode()
    def ask_experts(self, dispatcher: Dispatcher) -> None:
        """All of them, about the first rows that a gate sent anywhere."""
        num_experts = self._decoder.architecture.num_experts
        for layer, chosen in self.parts.chosen.items():
            rows = chosen.rows[chosen.rows.isfinite().all(1)][:ROWS]
            if not len(rows):
                continue
            self.parts.asked[layer] = rows
            every = rows.to(self._decoder.device).repeat(num_experts, 1)  # [E · R, D]
            experts = torch.arange(num_experts, device=every.device).repeat_interleave(len(rows))[:, None]
            with closing(dispatcher.dispatch(self._dispatched[layer], every, experts)) as dispatch:
                answers = dispatcher.combine(dispatch, torch.ones_like(experts, dtype=torch.float32))
            self.parts.answers[layer] = answers.view(num_experts, len(rows), -1).cpu()

    def _note_native(self, decoder: Decoder) -> None:
        """Layer by layer, as transformers names them."""
        layers, head, norm = decoder.layers, decoder.head, decoder.norm_rows
        self.parts.embeddings = _copied(decoder.embeddings)
        decoder.norm_rows = self._noted_norm(decoder)  # type: ignore[method-assign]
        decoder.layers = [self._noted_layer(index, layer) for index, layer in enumerate(layers)]
        decoder.head = self._noted(HEAD, head)
        decoder.runs_chains = False

        def undo() -> None:
            decoder.layers, decoder.head, decoder.runs_chains = layers, head, True
            decoder.norm_rows = norm  # type: ignore[method-assign]

        self._undo.append(undo)

    def _noted_norm(self, decoder: Decoder) -> Callable[..., torch.Tensor]:
        """Of any part. Which it is, its weights tell."""
        names = {id(decoder.norm): NORM}
        for index, layer in enumerate(decoder.layers):
            names[id(layer.input_norm)] = f"layers.{index}.input_layernorm"
            names[id(layer.post_attention_norm)] = f"layers.{index}.post_attention_layernorm"
            for which, weight in zip("qk", layer.qk_norms or (), strict=False):
                names[id(weight)] = f"layers.{index}.self_attn.{which}_norm"
        norm = decoder.norm_rows

        def noted(x: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
            made = norm(x, weight, delta)
            self._note(names[id(weight)], (x,), {}, made)  # `delta` was added to it in place
            return made

        return noted

    def _noted_layer(self, index: int, layer: Any) -> Any:
        name = f"layers.{index}"
        network = f"{name}.mlp" if layer.gate is None else f"{name}.mlp.shared_expert"
        self._dispatched[index] = index
        heads, kv_heads = self._decoder.architecture.num_heads, self._decoder.architecture.num_kv_heads
        widths = [self._decoder.architecture.head_dim * number for number in (heads, kv_heads, kv_heads)]

        def qkv(rows: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = layer.qkv(rows)
            biased = made if layer.qkv_bias is None else made + layer.qkv_bias
            for which, part in zip("qkv", biased.split(widths, dim=1), strict=True):
                self._note(f"{name}.self_attn.{which}_proj", (rows,), {}, part)
            return made

        def gate(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, experts = layer.gate(rows)
            self._note_chosen(index, None, rows, experts, weights)
            return weights, experts

        def dense(rows: torch.Tensor) -> Any:
            if layer.dense_gate is not None:
                self._note(f"{network}_gate", (rows,), {}, shared_expert_scores(layer, rows))
            return self._noted(network, layer.dense)(rows)

        return replace(
            layer,
            qkv=qkv,
            o=self._noted(f"{name}.self_attn.o_proj", layer.o),
            gate=layer.gate and gate,
            dense=layer.dense and dense,
        )

    def _noted(self, name: str, part: Callable[..., Any]) -> Any:
        def noted(rows: torch.Tensor) -> Any:
            given = _copied(rows)
            made = part(rows)
            self._note(name, (given,), {}, made)
            return made

        return noted

    def _note_modules(self, decoder: TransformersDecoder) -> None:
        layers, embed = layers_of(decoder.model), decoder.model.get_input_embeddings()
        self.parts.embeddings = _embedded(embed)
        parts = {name: module for name, module in _apart(layers) if module is not embed}
        if (head := decoder.model.get_output_embeddings()) is not None:
            parts[HEAD] = head
        for name, module in parts.items():
            given: list[Any] = []  # copied before: some write over what they were given

            def before(_: nn.Module, arguments: Any, keywords: Any, given: list[Any] = given) -> None:
                given[:] = _copied((arguments, keywords))

            def after(_: nn.Module, *outcome: Any, name: str = name, given: list[Any] = given) -> None:
                self._note(name, given[0], given[1], outcome[-1])

            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(after).remove)
        for name, module in layers.named_modules():
            if isinstance(module, DispatchedExperts) and (match := _LAYER.match(name)):

                def chosen(module: Any, arguments: Any, layer: int = int(match[1]), name: str = name) -> None:
                    self._dispatched[layer] = module.layer
                    self._note_chosen(layer, name, *arguments)

                self._undo.append(module.register_forward_pre_hook(chosen).remove)

    def _note(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if name not in self.parts.calls:
            self.parts.calls[name] = Call(_copied(arguments), _copied(keywords), _copied(output))

    def _note_chosen(
        self, layer: int, name: str | None, rows: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if layer not in self.parts.chosen:
            self.parts.chosen[layer] = Chosen(name, _copied(rows), _copied(experts), _copied(weights))


@torch.inference_mode()
def compare(parts: Parts, model: Any, dtype: str) -> tuple[PartDifference, ...]:
    """The parts of ours that differ from those of `model`, which is transformers', in the order of layers."""
    device, layers = model.device, layers_of(model)
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    found = list(_embedding_difference(parts.embeddings, _embedded(model.get_input_embeddings())))
    for name, call in parts.calls.items():
        if not call.is_finite:
            continue
        module = model.get_output_embeddings() if name == HEAD else layers.get_submodule(name)
        theirs = module(*_to(device, call.arguments), **_to(device, call.keywords))
        match = _LAYER.match(name)
        layer, part = (int(match[1]), match[2]) if match else (None, name)
        found += _difference(layer, part, None, call.output, _copied(theirs), OFF[dtype])
    for name, module in layers.named_modules():
        if not is_experts(module) or not (match := _LAYER.match(name)) or int(match[1]) not in parts.chosen:
            continue
        layer = int(match[1])
        if parts.chosen[layer].name not in (None, name):
            continue  # of pictures
        if parts.chosen[layer].rows.shape[1] == hidden_size:  # else they were made narrower between gate and experts
            block = layers.get_submodule(name.rpartition(".")[0])
            found += _gate_difference(layer, AskedGate(block, module, dtype), parts.chosen[layer], dtype)
        if layer not in parts.answers:
            continue
        answers = parts.answers[layer]
        theirs = _ask(module, parts.asked[layer].to(device), len(answers)).view(answers.shape).cpu()
        for expert, (one, other) in enumerate(zip(answers, theirs, strict=True)):
            found += _difference(layer, f"expert {expert}", expert, one, other, OFF[dtype])
    last = 1 + max((one.layer for one in found if one.layer is not None), default=0)
    return tuple(sorted(found, key=lambda one: _place(one, last)))


def part_lines(found: Sequence[PartDifference]) -> list[str]:
    """A line for each part; one for all experts of a layer that are off, and one for those that are not finite."""
    lines = []
    for _, group in groupby(found, lambda one: (one.layer, *_kind(one))):
        of_kind = list(group)
        first, layer = of_kind[0], of_kind[0].layer
        where = first.part if layer is None else f"layer {layer}: {first.part}"
        if first.expert is not None and len(of_kind) > 1:
            experts = ", ".join(str(one.expert) for one in of_kind[:SHOWN_EXPERTS])
            more = f" and {len(of_kind) - SHOWN_EXPERTS} more" if len(of_kind) > SHOWN_EXPERTS else ""
            where = f"layer {layer}: experts {experts}{more}"
        sides = [side for side, does in (("here", first.here), ("by transformers' code", first.there)) if does]
        several = "" if len(of_kind) == 1 else " at most"
        if first.off is None:
            lines.append(f"{where}: makes numbers that are not finite, {' and '.join(sides)}")
        elif first.part == GATE:
            lines.append(f"layer {layer}: gate: {first.off:.0%} of the tokens go to other experts")
        else:
            largest = max(one.off or 0.0 for one in of_kind)
            lines.append(f"{where}: off by {largest:.2g} of its largest number{several}")
    return lines


def _kind(one: PartDifference) -> tuple[str, bool, bool]:
    """What is told in one line, of a layer."""
    return "" if one.expert is not None else one.part, one.here, one.there


def _place(one: PartDifference, last: int) -> int:
    """As a token goes through them: what is in no layer is before them all, but for the head and the last norm."""
    if one.layer is not None:
        return one.layer
    return last if one.part in (HEAD, NORM) else -1


def _ask(module: Any, rows: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Transformers' experts about `rows` [R, D]: [E · R, D]."""
    every = rows.repeat(num_experts, 1)
    if len(signature(module.forward).parameters) == 1:
        answers: torch.Tensor = module(every)  # Llama 4's take them by expert
    else:
        experts = torch.arange(num_experts, device=rows.device).repeat_interleave(len(rows))[:, None]
        answers = module(every, experts, torch.ones_like(experts, dtype=rows.dtype))
    return answers


def _gate_difference(layer: int, gate: AskedGate, chosen: Chosen, dtype: str) -> Iterator[PartDifference]:
    """Whether the same rows go to other experts, of which none is nearly as likely, or with other weights."""
    finite = chosen.rows.isfinite().all(1)
    # Where the gate is apart from its experts, it was given other rows than they; it is a part that was noted.
    if gate.is_apart or not gate.can_be_asked or not bool(finite.any()):
        return
    rows, mine = chosen.rows[finite], Routed(chosen.experts[finite], chosen.weights[finite].float()).by_expert()
    if (said := gate(rows)) is None:
        return
    theirs = Routed(said.experts.cpu(), said.weights.float().cpu()).by_expert()
    if mine.experts.shape != theirs.experts.shape:
        yield PartDifference(layer, GATE, None, 1.0, here=False, there=False)
        return
    followed, _ = gate.follow(rows, theirs, mine)
    others = float((mine.experts != followed.by_expert().experts).any(1).float().mean())
    kept = ((followed.experts == theirs.experts) & (followed.weights == theirs.weights)).all(1)
    if others:
        yield PartDifference(layer, GATE, None, others, here=False, there=False)
    elif bool(kept.any()):
        yield from _difference(layer, f"{GATE}'s weights", None, mine.weights[kept], theirs.weights[kept], OFF[dtype])


@torch.inference_mode()
def _embedded(embed: nn.Module) -> torch.Tensor:
    """Of all tokens [V, D]."""
    weight: Any = embed.weight
    return torch.cat([embed(ids).cpu() for ids in torch.arange(len(weight), device=weight.device).split(TOKENS)])


def _embedding_difference(mine: torch.Tensor | None, theirs: torch.Tensor) -> Iterator[PartDifference]:
    """Of rows [V, D], which nothing has rounded."""
    if mine is None or mine.shape != theirs.shape:
        yield PartDifference(None, EMBEDDINGS, None, float("inf"), here=False, there=False)
        return
    wrong = torch.cat(
        [(one != other).any(1) for one, other in zip(mine.split(TOKENS), theirs.split(TOKENS), strict=True)]
    )
    if tokens := wrong.nonzero().flatten().tolist():
        more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
        yield from _difference(None, f"{EMBEDDINGS} of token {tokens[0]}{more}", None, mine[wrong], theirs[wrong], 0.0)


def _difference(
    layer: int | None, part: str, expert: int | None, mine: Any, theirs: Any, tolerance: float
) -> Iterator[PartDifference]:
    """If there is one: of a part that chooses, of what it chooses by."""
    pairs = list(zip(_numbers(mine), _numbers(theirs), strict=True))
    if len(pairs) > 1 and len(pairs) < len(tree_leaves(mine)):
        pairs = pairs[:1]  # scores of all experts come before those of the chosen
    finite = [all(bool(one.isfinite().all()) for one in side) for side in zip(*pairs, strict=True)] or [True, True]
    if not all(finite):
        yield PartDifference(layer, part, expert, None, here=not finite[0], there=not finite[1])
        return
    off = max((_off(one, other) for one, other in pairs), default=0.0)
    if off > tolerance:
        yield PartDifference(layer, part, expert, off, here=False, there=False)


def _off(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    if mine.numel() != theirs.numel():
        return float("inf")
    difference = float((mine.reshape(theirs.shape).float() - theirs.float()).abs().max()) if mine.numel() else 0.0
    largest = float(theirs.float().abs().max()) if difference else 1.0
    return difference / largest if largest else float("inf")


def _apart(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules in which are neither attention, whatever it is of, nor experts."""
    for name, child in module.named_children():
        inner = child.modules()
        if isinstance(child, DispatchedExperts):
            continue
        if isinstance(child, nn.ModuleList) or any(
            hasattr(one, "layer_idx") or isinstance(one, DispatchedExperts) for one in inner
        ):
            yield from _apart(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _numbers(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor) and one.is_floating_point()]


def _copied(tree: Any) -> Any:
    """On the host."""
    return tree_map(lambda one: one.to("cpu", copy=True) if isinstance(one, torch.Tensor) else one, tree)


def _to(device: torch.device, tree: Any) -> Any:
    """Copies: some parts write over what they are given."""
    return tree_map(lambda one: one.to(device, copy=True) if isinstance(one, torch.Tensor) else one, tree)
