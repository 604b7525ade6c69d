"""The maths of experts as the model's own class has it: a subset of them in all layers, rows grouped by expert.

Products are of each expert's rows; what is between them, activations, biases and clamps, is the class's own code over
all rows at once. Where that is SwiGLU, and kernels of ours multiply, the class is the one that native models have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint
from experts_service.kernels.experts import Experts, expert_tensor_names
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.kernels.linear import Linear
from experts_service.kernels.swiglu import Chained, Prepared
from experts_service.memory import give_back_freed
from experts_service.transformers_backend.loading import load_experts
from experts_service.transformers_backend.meta_model import build

# R rows, E experts, D hidden size, F intermediate size


def load(
    checkpoint: Checkpoint,
    experts: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Experts | TransformersExperts:
    """Read the experts' tensors, and only those. Raises CheckpointError."""
    meta = build(checkpoint.directory, checkpoint.architecture, dtype)
    layers = [_Layer(module) for module in load_experts(meta, checkpoint, experts, device, on_bytes)]
    kernel = kernel_for(dtype, device, kernel)
    if (kernel.is_own or compiles_for(device)) and all(layer.is_swiglu for layer in layers):
        loaded = Experts(experts, _swiglus(experts, layers), kernel=kernel)
        loaded.warm_up()
        return loaded
    return TransformersExperts(experts, layers, kernel)


class TransformersExperts:
    """The weights of some experts in all layers that have experts, and what they compute."""

    takes_ends = False

    def __init__(self, experts: Sequence[int], layers: Sequence[_Layer], kernel: Kernel) -> None:
        self.experts = tuple(experts)
        self.dtype, self.device, self.hidden = layers[0].dtype, layers[0].device, layers[0].hidden
        self._layers = list(layers)
        for layer in self._layers:
            layer.pack(kernel)
            give_back_freed()

    @property
    def num_layers(self) -> int:
        """Those that have experts."""
        return len(self._layers)

    def chained(self, layer: int) -> Chained | None:  # noqa: ARG002
        """No chain runs them."""
        return None

    def prepared(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared | None:  # noqa: ARG002
        """The same."""
        return None

    def run(self, layer: int, rows: Tensor, ends: Tensor, answers: Tensor) -> None:
        """`takes_ends` says that it is not to be called."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        """`rows` [R, D], the first counts[0] for the first expert and so on → `answers` [R, D], new unless given."""
        if answers is None:
            answers = torch.empty_like(rows)
        self._layers[layer](rows, counts, answers)
        return answers


class _Layer:
    """The experts of one layer, as a module of transformers with these experts only."""

    def __init__(self, module: Any) -> None:
        """Llama 4's and Step 3.7's have none of the attributes that the experts interface gives to all others."""
        self._module = module
        self._has_gate = getattr(module, "has_gate", True)
        self._has_bias = getattr(module, "has_bias", False)
        self._has_norm = getattr(module, "has_post_expert_norm", False)
        self._is_transposed = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
        self._into, self._out = "gate_up_proj" if self._has_gate else "up_proj", "down_proj"
        weights = self._weights(self._out)
        self.dtype, self.device, self.hidden = weights.dtype, weights.device, weights.shape[1]
        self._products: dict[str, list[Linear]] = {}

    @property
    def is_swiglu(self) -> bool:
        """Whether it is down(silu(gate) · up) and nothing else: no clamp, and rounded as that is. Told by numbers."""
        if not self._has_gate or self._has_bias or self._has_norm:
            return False
        hidden = torch.linspace(-8, 8, 2048).sinh().to(self.dtype).view(16, -1)
        gate, up = hidden.chunk(2, dim=-1)
        return torch.equal(self._activated(hidden), F.silu(gate) * up)

    def taken(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """w1 [F, D], w2 [D, F] and w3 [F, D] of each expert, where it is SwiGLU. It has them no more."""
        into, out = self._weights(self._into), self._weights(self._out)
        self._drop()
        for gate_up, down in zip(into, out, strict=True):
            w1, w3 = gate_up.chunk(2)
            yield w1, down, w3

    def pack(self, kernel: Kernel) -> None:
        """Before it is called. A packed matrix is a copy."""
        for name in (self._into, self._out):
            self._products[name] = [Linear(weight, kernel) for weight in self._weights(name)]
        if kernel is not Kernel.TORCH:
            self._drop()

    def __call__(self, rows: Tensor, counts: Sequence[int], answers: Tensor) -> None:
        """`rows` [R, D], by expert → `answers` [R, D]."""
        hidden = self._multiply(self._into, rows, counts, None)  # [R, 2F]; [R, F] without a gate
        self._multiply(self._out, self._activated(hidden), counts, answers)
        if self._has_norm:
            answers.copy_(self._module.post_expert_norm(answers))

    def _activated(self, hidden: Tensor) -> Tensor:
        """[R, F] of what the first product made."""
        module = self._module
        activated: Tensor
        if hasattr(module, "_apply_gate"):
            activated = module._apply_gate(hidden) if self._has_gate else module.act_fn(hidden)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            activated = module.act_fn(gate) * up
        return activated

    def _multiply(self, name: str, rows: Tensor, counts: Sequence[int], out: Tensor | None) -> Tensor:
        """Each expert's rows by its matrix, and its bias: [R, out]."""
        products = self._products[name]
        if out is None:
            out = rows.new_empty(len(rows), products[0].out_features)
        start = 0
        for count, product in zip(counts, products, strict=True):
            if count:
                out[start : start + count] = product(rows[start : start + count])
                start += count
        if self._has_bias:
            bias = getattr(self._module, f"{name}_bias")  # [E, out]
            out += bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0, output_size=len(rows))
        return out

    def _weights(self, name: str) -> Tensor:
        """[E, out, in]."""
        whole: Tensor = getattr(self._module, name).detach()
        return whole.transpose(1, 2) if self._is_transposed else whole

    def _drop(self) -> None:
        for name in (self._into, self._out):
            setattr(self._module, name, None)


def _swiglus(experts: Sequence[int], layers: Sequence[_Layer]) -> Iterator[Mapping[str, Tensor]]:
    """As native models have them, a layer at a time."""
    for index, layer in enumerate(layers):
        yield {
            name: tensor
            for expert, of_expert in zip(experts, layer.taken(), strict=True)
            for name, tensor in zip(expert_tensor_names(index, expert), of_expert, strict=True)
        }
        give_back_freed()
