"""What is done to each row between two matmuls of a layer: norm, rotary, gate, combining. Knows no layer.

One compiled call each in bf16 on a CPU (row_kernels.py), one kernel on a GPU (gpu_rows.py) where Triton can compile it,
else torch's operations. All round where the reference does.

Shapes: T tokens, D hidden size, N heads, H head_dim, K experts per token, E experts.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch

from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.jit import AVAILABLE
from experts_service.kernels.compiled.route import Route
from experts_service.kernels.compiled.routine import Task, num_threads
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.transport import Answers

if AVAILABLE:
    from experts_service.kernels.compiled.vectors import LANES
    from router_service import row_kernels

Pair = tuple[torch.Tensor, torch.Tensor]

_InPlaceTask = ctypes.c_int64 * 13
_BYTES = 8  # that an element takes: it is read, read again and written


def warm_up(dtype: torch.dtype, device: torch.device) -> None:
    """Have what serves such rows compiled, or read from where it is kept: a step does not wait for that."""
    if is_compiled(torch.empty(0, dtype=dtype, device=device), 0):
        for routine in (
            row_kernels.norm,
            row_kernels.rotate,
            row_kernels.choose,
            row_kernels.combine,
            row_kernels.combine_in_place,
        ):
            routine.load()
        Chain.load()
        Route.load()


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, delta: torch.Tensor | None = None) -> torch.Tensor:
    """Root mean square norm of `x` [T, D], arXiv 1910.07467, in fp32; rounded before `weight` [D] like the reference.

    `delta` [T, D], if any, is added to `x` in place before.
    """
    if is_launched(x):
        from router_service import gpu_rows  # Triton takes a second

        return gpu_rows.norm(x, weight, epsilon, delta)
    if not is_compiled(x, x.shape[-1]):
        if delta is not None:
            x += delta
        wide = x.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + epsilon)
        return weight * wide.to(x.dtype)
    assert x.is_contiguous(), "it is written to"
    rows = torch.empty_like(x)
    delta = None if delta is None else delta.contiguous()
    norm_task(x, weight, epsilon, delta, rows).run()
    return rows


def norm_task(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, delta: torch.Tensor | None, rows: torch.Tensor
) -> Task:
    """What writes `rows` [T, D], where `is_compiled`. None of them has gaps."""
    num_rows, width = x.shape
    arguments = (
        num_rows,
        width,
        _bits(epsilon),
        x.data_ptr(),
        0 if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        rows.data_ptr(),
    )
    return Task(row_kernels.norm, _num_threads(num_rows, width), arguments)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads of `x` [T, N, H], rotated by the angles of their positions [T, H]. It may be `x` itself, changed.

    Rotary position embedding, arXiv 2104.09864; both halves of the angles are the same, laid out as on the hub.
    """
    head_dim = x.shape[2]
    if is_launched(x) and x.stride(1) == head_dim and x.stride(2) == 1:
        from router_service import gpu_rows

        return gpu_rows.rotate(x, cosines, sines)
    if not is_compiled(x, head_dim // 2) or x.stride(1) != head_dim or x.stride(2) != 1:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * cosines[:, None] + turned * sines[:, None]
    rotate_task(x, cosines, sines).run()
    return x


def rotate_task(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> Task:
    """What rotates `x` itself, where `is_compiled`, whose rows alone may be apart."""
    num_rows, num_heads, head_dim = x.shape
    arguments = (num_rows, num_heads, head_dim, x.stride(0), x.data_ptr(), cosines.data_ptr(), sines.data_ptr())
    return Task(row_kernels.rotate, _num_threads(num_rows, num_heads * head_dim), arguments)


def choose(scores: torch.Tensor, top_k: int, *, renormalised: bool = True) -> Pair:
    """Of each row of `scores` [T, E] the `top_k` highest: their weights (fp32) and indices, both [T, K], highest first.

    Softmax over all in fp32, and, if `renormalised`, over the chosen.
    """
    if is_launched(scores):
        from router_service import gpu_rows

        return gpu_rows.choose(scores, top_k, renormalised=renormalised)
    if not is_compiled(scores, 0):
        probabilities = scores.float().softmax(dim=-1)  # [T, E]
        weights, experts = probabilities.topk(top_k, dim=-1)  # [T, K], [T, K]
        return (weights / weights.sum(dim=-1, keepdim=True) if renormalised else weights), experts
    choice = Choice(scores.contiguous(), top_k)
    choice.task.run()
    choice.settle()
    weights = choice.weights if renormalised else choice.probabilities.gather(1, choice.experts)
    return weights, choice.experts


class Choice:
    """The same as a task, where `is_compiled`: what it wrote is there when it has run."""

    def __init__(self, scores: torch.Tensor, top_k: int) -> None:
        """`scores` [T, E] without gaps."""
        num_rows, num_experts = scores.shape
        self._top_k = top_k
        self.probabilities = scores.new_empty((num_rows, num_experts), dtype=torch.float32)
        self.weights = scores.new_empty((num_rows, top_k), dtype=torch.float32)
        self.experts = scores.new_empty((num_rows, top_k), dtype=torch.int64)
        self._doubts = ctypes.c_int64(0)
        arguments = (
            num_rows,
            num_experts,
            top_k,
            scores.data_ptr(),
            self.probabilities.data_ptr(),
            self.weights.data_ptr(),
            self.experts.data_ptr(),
            ctypes.addressof(self._doubts),
        )
        self.task = Task(row_kernels.choose, 1, arguments, (scores,), ctypes.addressof(self._doubts))

    def settle(self) -> bool:
        """Let torch choose where it is in doubt. Whether it was: a chain halted then."""
        if not self._doubts.value:
            return False
        self._doubts.value = 0
        weights, experts = _choose_like_torch(self.probabilities, self._top_k)
        self.weights.copy_(weights)
        self.experts.copy_(experts)
        return True


class Combining:
    """The sum [T, D] of each row's answers [K · T, D] times its `weights` [T, K], each term and each sum rounded.

    In the order of `places` [K, T], where the answers are, and `pairs` [K, T], where the weights are, choice · T + row.
    None: one row's, as they stand. Only where `is_compiled`.

    It can be done again and again. After experts' weights have been read everything is cold, the interpreter most of
    all: what need not be done anew is not.
    """

    def __init__(self, weights: torch.Tensor, totals: torch.Tensor) -> None:
        """`weights` [T, K] and where the sums are written [T, D]: both stay where they are, and have no gaps."""
        assert weights.dtype is torch.float32, "the kernel reads them so"
        num_rows, top_k = weights.shape
        width = totals.shape[-1]
        self.totals = totals
        self._weights = weights
        self._task = _InPlaceTask(0, num_rows, top_k, width, 0, weights.data_ptr(), 0, 0, totals.data_ptr())
        self._address = ctypes.addressof(self._task)
        self._threads = 1 if num_rows == 1 else _num_threads(num_rows * top_k, width)

    def run(self, answers: torch.Tensor, places: torch.Tensor | None, pairs: torch.Tensor | None) -> None:
        """None of them has gaps."""
        combine_task(answers, self._weights, places, pairs, self.totals).run()

    def run_in_place(self, answers: Answers, places: torch.Tensor | None, pairs: torch.Tensor | None) -> bool:
        """The same of answers that lie where others may write: whether all sums are finite."""
        task = self._task
        task[0], task[12] = 0, 0
        task[4], task[10], task[11] = answers
        task[6] = 0 if places is None else places.data_ptr()
        task[7] = 0 if pairs is None else pairs.data_ptr()
        row_kernels.combine_in_place.run_at(self._address, self._threads)
        return not task[12]


def combine_task(
    answers: torch.Tensor,
    weights: torch.Tensor,
    places: torch.Tensor | None,
    pairs: torch.Tensor | None,
    totals: torch.Tensor,
) -> Task:
    """What writes `totals` [T, D]. None of them has gaps."""
    num_rows, top_k = weights.shape
    width = answers.shape[-1]
    arguments = (
        num_rows,
        top_k,
        width,
        answers.data_ptr(),
        weights.data_ptr(),
        0 if places is None else places.data_ptr(),
        0 if pairs is None else pairs.data_ptr(),
        totals.data_ptr(),
    )
    return Task(row_kernels.combine, _num_threads(num_rows * top_k, width), arguments)


def is_compiled(x: torch.Tensor, width: int) -> bool:
    """Whether rows of so many numbers like those of `x` are done by one compiled call."""
    return AVAILABLE and x.dtype is torch.bfloat16 and x.is_cpu and width % LANES == 0


def is_launched(x: torch.Tensor) -> bool:
    """Whether rows like those of `x` are done by kernels on their device."""
    return x.is_cuda and len(x) > 0 and compiles_for(x.device)


def _choose_like_torch(probabilities: torch.Tensor, top_k: int) -> Pair:
    """The same where some of a row are alike: which of them is chosen is torch's choice, as it is the reference's."""
    chosen, experts = probabilities.topk(top_k, dim=-1)
    whole = chosen[:, 0]
    for k in range(1, top_k):  # in the kernel's order: a row's bits do not hang on its neighbours
        whole = whole + chosen[:, k]
    return chosen / whole[:, None], experts


@lru_cache
def _bits(number: float) -> int:
    """Of the nearest float32."""
    return int(np.float32(number).view(np.int32))


def _num_threads(num_rows: int, width: int) -> int:
    return num_threads(_BYTES * num_rows * width, num_rows * width)
