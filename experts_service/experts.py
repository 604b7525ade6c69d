"""The maths of experts: SwiGLU over rows grouped by expert. Torch only; knows neither Ray nor transports.

Formula and rounding are those of `MixtralExperts` in transformers: w2(silu(w1 x) * (w3 x)), w1 and w3 in one matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint import Checkpoint
from experts_service.linear import Linear
from experts_service.weights import read_tensors

# R rows, D hidden size, F intermediate size


def expert_tensor_names(layer: int, expert: int) -> tuple[str, str, str]:
    """The checkpoint's canonical names of w1 [F, D], w2 [D, F] and w3 [F, D]."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return f"{prefix}.w1.weight", f"{prefix}.w2.weight", f"{prefix}.w3.weight"


class Experts:
    """The weights of some experts in all layers, and what they compute."""

    def __init__(self, experts: Sequence[int], layers: Iterable[Mapping[str, Tensor]]) -> None:
        """`layers` yields for each layer, in order, the tensors named by `expert_tensor_names`."""
        self.experts = tuple(experts)
        self._w13: list[list[Linear]] = []  # [layer][expert] → [2F, D]
        self._w2: list[list[Linear]] = []  # [layer][expert] → [D, F]
        for layer, weights in enumerate(layers):
            names = [expert_tensor_names(layer, expert) for expert in self.experts]
            self._w13.append([Linear(torch.cat((weights[w1], weights[w3]))) for w1, _, w3 in names])
            self._w2.append([Linear(weights[w2].contiguous()) for _, w2, _ in names])

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Experts:
        """Read the experts' tensors, and only those, one layer at a time."""

        def layers() -> Iterator[Mapping[str, Tensor]]:
            for layer in range(checkpoint.architecture.num_layers):
                names = [name for expert in experts for name in expert_tensor_names(layer, expert)]
                yield read_tensors(checkpoint, names, dtype=dtype, device=device, on_bytes=on_bytes)

        return cls(experts, layers())

    @property
    def num_layers(self) -> int:
        return len(self._w2)

    @property
    def dtype(self) -> torch.dtype:
        return self._w2[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self._w2[0][0].device

    @torch.inference_mode()
    def __call__(self, layer: int, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """`rows` [R, D], the first counts[0] for the first expert and so on → [R, D]."""
        answers = []
        start = 0
        for count, w13, w2 in zip(counts, self._w13[layer], self._w2[layer], strict=True):
            if count:
                answers.append(_swiglu(rows[start : start + count], w13, w2))
            start += count
        return answers[0] if len(answers) == 1 else torch.cat(answers)


def _swiglu(x: Tensor, w13: Linear, w2: Linear) -> Tensor:
    gate, up = w13(x).chunk(2, dim=-1)  # [R, F], [R, F]
    return w2(F.silu(gate) * up)  # [R, D]
