"""The maths of experts: SwiGLU over rows grouped by expert. Torch only; knows neither Ray nor transports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint.checkpoint import Checkpoint
from experts_service.device import upload
from experts_service.kernels.gpu import products
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.gpu.matrices import Matrices
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.kernels.swiglu import Chained, PackedSwiGLUs, Prepared, Scratch, SwiGLU, Weights
from experts_service.memory import give_back_freed
from experts_service.quantization.weight import Weight
from experts_service.weights import read_tensors

# R rows, D hidden size, F intermediate size


def expert_tensor_names(layer: int, expert: int) -> tuple[str, str, str]:
    """The checkpoint's canonical names of w1 [F, D], w2 [D, F] and w3 [F, D]."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return f"{prefix}.w1.weight", f"{prefix}.w2.weight", f"{prefix}.w3.weight"


class _OneByOne:
    """The experts of a layer, a network for each that has rows."""

    def __init__(self, weights: Sequence[Weights], kernel: Kernel | None) -> None:
        self._experts = [
            SwiGLU(*of_expert, fused=of_expert[0].device.type != "cpu", kernel=kernel) for of_expert in weights
        ]

    def __call__(self, rows: Tensor, counts: Sequence[int], answers: Tensor) -> None:
        start = 0
        for count, expert in zip(counts, self._experts, strict=True):
            if count:
                answers[start : start + count] = expert(rows[start : start + count])  # [R, D]
            start += count


class _Grouped:
    """The experts of a layer as products of all their rows at once, without asking the host."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._w13 = Matrices.pack([(w1, w3) for w1, _, w3 in weights])  # [E, 2F, D]
        self._w2 = Matrices.pack([(w2,) for _, w2, _ in weights])  # [E, D, F]

    def __call__(self, rows: Tensor, ends: Tensor, answers: Tensor) -> None:
        """The rows of expert e end before `ends` [E] (int32, where the rows are)."""
        products.multiply(products.gate_up(rows, self._w13, ends), self._w2, ends, answers)  # [R, D]


class Experts:
    """The weights of some experts in all layers, and what they compute."""

    def __init__(
        self,
        experts: Sequence[int],
        layers: Iterable[Mapping[str, Weight]],
        *,
        grouped: bool | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        """`layers` yields for each layer, in order, the tensors of `expert_tensor_names`; none: it has no experts.

        `grouped`: rows of all experts at once, by kernels for GPUs; None: where they can be compiled. `kernel`: what
        multiplies bf16 on a CPU.
        """
        self.experts = tuple(experts)
        self._scratch = Scratch()
        self._layers: list[_OneByOne | _Grouped | PackedSwiGLUs | None] = []
        for layer, weights in enumerate(layers):
            if not weights:
                self._layers.append(None)
                continue
            of_experts = []
            for expert in self.experts:
                w1, w2, w3 = (weights[name] for name in expert_tensor_names(layer, expert))
                of_experts.append((w1, w2, w3))
            self.dtype, self.device, self.hidden = w2.dtype, w2.device, w2.shape[0]
            if grouped is None:
                grouped = compiles_for(self.device)
            kernel = kernel_for(self.dtype, self.device, kernel)
            if grouped:
                self._layers.append(_Grouped(of_experts))
            else:
                packed = PackedSwiGLUs.pack(of_experts, kernel)
                self._layers.append(_OneByOne(of_experts, kernel) if packed is None else packed)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernel: Kernel | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Experts:
        """Read the experts' tensors, and only those, one layer at a time."""

        def layers() -> Iterator[Mapping[str, Weight]]:
            for layer, spec in enumerate(checkpoint.architecture.layers):
                names = [name for expert in experts if spec.has_experts for name in expert_tensor_names(layer, expert)]
                yield read_tensors(checkpoint, names, dtype=dtype, device=device, on_bytes=on_bytes)
                give_back_freed()

        loaded = cls(experts, layers(), kernel=kernel)
        loaded.warm_up()
        return loaded

    def warm_up(self) -> None:
        """Have what a GPU multiplies few rows and many with compiled: nobody's rows wait for that."""
        for layer, networks in enumerate(self._layers):
            if isinstance(networks, _Grouped):
                for num_rows in products.few_and_many(len(self.experts)):
                    rows = torch.zeros(num_rows, self.hidden, dtype=self.dtype, device=self.device)
                    self(layer, rows, [num_rows, *[0] * (len(self.experts) - 1)])

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def takes_ends(self) -> bool:
        """Whether `run` can be called: nobody on the host has to know how many rows each expert has."""
        return all(isinstance(networks, _Grouped) for networks in self._layers if networks is not None)

    @torch.inference_mode()
    def run(self, layer: int, rows: Tensor, ends: Tensor, answers: Tensor) -> None:
        """`rows` [R, D], those of expert e before `ends` [E] (int32, where the rows are) → `answers` [R, D]."""
        networks = self._layers[layer]
        assert isinstance(networks, _Grouped), "`takes_ends` was asked"
        networks(rows, ends, answers)

    def chained(self, layer: int) -> Chained | None:
        """How a chain runs those of a layer, if one can."""
        networks = self._layers[layer]
        return networks.chained if isinstance(networks, PackedSwiGLUs) else None

    def prepared(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Prepared | None:
        """What a call does, to be run without Python, by one thread at a time; None: that cannot be."""
        networks = self._layers[layer]
        return networks.prepared(rows, counts, answers, self._scratch) if isinstance(networks, PackedSwiGLUs) else None

    @torch.inference_mode()
    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int], answers: Tensor | None = None) -> Tensor:
        """`rows` [R, D], the first counts[0] for the first expert and so on → `answers` [R, D], new unless given."""
        if answers is None:
            answers = torch.empty_like(rows)
        networks = self._layers[layer]
        assert networks is not None, "nobody sends rows of a layer without experts"
        if isinstance(networks, _Grouped):
            [ends] = upload([np.cumsum(counts, dtype=np.int32)], rows.device)
            networks(rows, ends, answers)
        else:
            networks(rows, counts, answers)
        return answers
