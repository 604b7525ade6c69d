"""Feed-forward networks of the family: experts' in one layer, or a dense layer's. Tensors only; knows no names.

Formula and rounding are those of transformers: w2(silu(w1 x) * (w3 x)).

Shapes: R rows, D hidden size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experts_service.kernels.compiled.chain import Chain
from experts_service.kernels.compiled.matmul import Panels, networks_task, pack_gate_up, run_networks
from experts_service.kernels.compiled.quantized_matmul import (
    QuantizedPanels,
    is_multiplied_here,
    pack_alike,
    product_tasks,
    run_quantized,
)
from experts_service.kernels.compiled.routine import Task
from experts_service.kernels.compiled.tile import PAIR
from experts_service.kernels.gpu.launch import compiles_for
from experts_service.kernels.kernel import Kernel, kernel_for
from experts_service.kernels.linear import Linear
from experts_service.quantization.weight import QuantizedWeight, Weight, dense, stacked

Weights = tuple[Weight, Weight, Weight]  # w1 [F, D], w2 [D, F], w3 [F, D]
_Run = Callable[[Tensor, Sequence[int], Tensor], None]  # rows, how many of each network, answers
# jobs of each table, rows [R, D], room for R · F numbers and for R · integers, answers [R, D]
_MakeTasks = partial[list[Task]]


class SwiGLU:
    """One network, its matrices packed once."""

    def __init__(self, w1: Weight, w2: Weight, w3: Weight, *, fused: bool, kernel: Kernel | None = None) -> None:
        """`w1` and `w3` [F, D], `w2` [D, F]. `fused`: torch does w1 and w3 as one matmul."""
        kernel = kernel_for(w1.dtype, w1.device, kernel)
        self._packed = PackedSwiGLUs.pack([(w1, w2, w3)], kernel)
        if self._packed is None:
            of_gate = (stacked((w1, w3)),) if fused else (w1, w3)
            self._w1_w3 = [Linear(weight, kernel) for weight in of_gate]  # D → 2F, or D → F each
            self._w2 = Linear(w2, kernel)  # F → D

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows` [R, D] → [R, D]."""
        if self._packed is not None:
            return self._packed(rows, (len(rows),), torch.empty_like(rows))
        outputs = [matrix(rows) for matrix in self._w1_w3]
        if len(outputs) == 1:
            return self._w2(silu_product(outputs[0]))
        gate, up = outputs  # [R, F], [R, F]
        return self._w2(F.silu(gate) * up)


def silu_product(gate_up: Tensor) -> Tensor:
    """silu(gate) · up [R, F] of rows [R, 2 F] of both, each rounded."""
    if gate_up.is_cuda and len(gate_up) and compiles_for(gate_up.device):
        from experts_service.kernels.gpu import silu  # Triton takes a second

        return silu.silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)  # [R, F], [R, F]
    return F.silu(gate) * up


@dataclass(frozen=True, slots=True)
class Chained:
    """How networks of one size are run in a chain, whichever of them have rows."""

    tables: tuple[Tensor, ...]  # [E, fields] each; jobs are rows of them (see route.py)
    intermediate: int  # F
    integers: int  # int32 that a row needs meanwhile
    layouts: tuple[object, ...]  # of quantised matrices
    make_tasks: _MakeTasks
    weights: tuple[object, ...]  # whose addresses are in the tables

    def is_like(self, other: Chained) -> bool:
        """Whether their networks can be run together."""
        return self.make_tasks.func is other.make_tasks.func and self._sizes == other._sizes

    @property
    def _sizes(self) -> tuple[object, ...]:
        return (self.intermediate, self.integers, self.layouts, [table.shape[1] for table in self.tables])


class Scratch:
    """Memory for what nobody needs when a chain has been run, whichever it is: one thread has one."""

    def __init__(self) -> None:
        self._rooms: dict[torch.dtype, Tensor] = {}

    def room(self, dtype: torch.dtype, number: int) -> Tensor:
        """For so many numbers. What was given before stays where it is."""
        room = self._rooms.get(dtype, torch.empty(0, dtype=dtype))
        if len(room) < number:
            room = self._rooms[dtype] = torch.empty(max(number, 2 * len(room)), dtype=dtype)
        return room[:number]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Networks' work on rows at one place, to be run again without Python, for any networks of as many as have rows.

    Jobs and scratch are others' as well: one is run at a time.
    """

    chain: Chain
    tables: Sequence[Tensor]  # [E, fields] each; see route.py
    jobs: Sequence[Tensor]  # [J, fields] each: before the chain is run, of each network with rows its row of the table
    scratch: Sequence[Tensor] = ()


class PackedSwiGLUs:
    """Several networks of one size, run by our own kernels: the threads share the panels of all."""

    def __init__(self, run: _Run, chained: Chained | None = None) -> None:
        """`pack` makes it. `chained`: where their rows need no more than kernels of our own."""
        self._run = run
        self.chained = chained

    @classmethod
    def pack(cls, weights: Sequence[Weights], kernel: Kernel) -> PackedSwiGLUs | None:
        """None where kernels of our own do not run all of them together: some quantised, some not, or unlike."""
        if any(isinstance(weight, QuantizedWeight) for network in weights for weight in network):
            w1_w3 = pack_alike(
                [stacked((w1, w3)) for w1, _, w3 in weights], gate_up=True, arithmetic=kernel.own_arithmetic
            )
            w2 = pack_alike([w2 for _, w2, _ in weights], arithmetic=kernel.own_arithmetic)
            if w1_w3 is not None and w2 is not None:
                return cls(partial(run_quantized, w1_w3, w2), _chained_quantized(w1_w3, w2))
            if any(map(is_multiplied_here, chain.from_iterable(weights))):
                return None
        if not kernel.is_own:
            return None
        networks = [(pack_gate_up(dense(w1), dense(w3)), Panels.pack(dense(w2))) for w1, w2, w3 in weights]
        arithmetic = kernel.arithmetic
        return cls(
            lambda rows, counts, answers: run_networks(arithmetic, rows, networks, counts, answers),
            _chained_networks(arithmetic, networks),
        )

    def __call__(self, rows: Tensor, counts: Sequence[int], answers: Tensor) -> Tensor:
        """`answers` [R, D], written: the first counts[0] of `rows` [R, D] through the first network, and so on."""
        if self.chained is None:
            self._run(rows, counts, answers)
        else:
            _run_chained(self.chained, rows, counts, answers)
        return answers

    def prepared(self, rows: Tensor, counts: Sequence[int], answers: Tensor, scratch: Scratch) -> Prepared | None:
        """The same work, for these places; None where kernels of our own do not do all of it."""
        chained = self.chained
        if chained is None or not any(counts):
            return None
        num_jobs = sum(map(bool, counts))
        sizes = [num_jobs * table.shape[1] for table in chained.tables]
        jobs = [of_table.view(num_jobs, -1) for of_table in scratch.room(torch.int64, sum(sizes)).split(sizes)]
        hidden = scratch.room(torch.bfloat16, len(rows) * chained.intermediate).view(len(rows), -1)
        integers = scratch.room(torch.int32, len(rows) * chained.integers)
        tasks = chained.make_tasks(jobs, rows, hidden, integers, answers)
        return Prepared(Chain(tasks), chained.tables, jobs, (hidden, integers))


def _run_chained(chained: Chained, rows: Tensor, counts: Sequence[int], answers: Tensor) -> None:
    """However many networks there are, Python looks at none by itself."""
    of_each = np.fromiter(counts, np.int64, len(counts))
    active = of_each.nonzero()[0]
    if not len(active):
        return
    first_rows = (of_each.cumsum() - of_each)[active]
    jobs = []
    for table in chained.tables:
        of_table = table.numpy()[active]
        of_table[:, -2], of_table[:, -1] = first_rows, of_each[active]
        jobs.append(torch.from_numpy(of_table))
    rows = rows.contiguous()
    hidden = rows.new_empty(len(rows), chained.intermediate)  # [R, F]
    integers = torch.empty(len(rows) * chained.integers, dtype=torch.int32)
    tasks = chained.make_tasks(jobs, rows, hidden, integers, answers)
    (tasks[0] if len(tasks) == 1 else Chain(tasks)).run()


def _chained_networks(arithmetic: int, networks: Sequence[tuple[Panels, Panels]]) -> Chained | None:
    first, second = networks[0]
    if first.in_features % PAIR or second.in_features % PAIR:
        return None  # a zero has to follow each row
    table = torch.tensor([(w1_w3.weights.data_ptr(), w2.weights.data_ptr(), 0, 0) for w1_w3, w2 in networks])
    make_tasks = partial(_network_tasks, arithmetic, networks[0])
    return Chained((table,), second.in_features, 0, (), make_tasks, (networks,))


def _network_tasks(
    arithmetic: int,
    network: tuple[Panels, Panels],
    jobs: Sequence[Tensor],
    x: Tensor,
    hidden: Tensor,
    _integers: Tensor,
    y: Tensor,
) -> list[Task]:
    return [networks_task(arithmetic, x, network, jobs[0], hidden, y)]


def _chained_quantized(w1_w3: Sequence[QuantizedPanels], w2: Sequence[QuantizedPanels]) -> Chained | None:
    if any(matrix.columns is not None for matrix in chain(w1_w3, w2)):
        return None  # numbers of a row would have to be put in order
    tables = tuple(torch.tensor([(*matrix.job, 0, 0) for matrix in matrices]) for matrices in (w1_w3, w2))
    integers = max(w1_w3[0].row_words, w2[0].row_words)
    layouts = (w1_w3[0].layout, w2[0].layout)
    make_tasks = partial(_quantized_tasks, w1_w3[0], w2[0])
    return Chained(tables, w2[0].in_features, integers, layouts, make_tasks, (w1_w3, w2))


def _quantized_tasks(
    w1_w3: QuantizedPanels,
    w2: QuantizedPanels,
    jobs: Sequence[Tensor],
    x: Tensor,
    hidden: Tensor,
    integers: Tensor,
    y: Tensor,
) -> list[Task]:
    of_gate = product_tasks(x, w1_w3, jobs[0], hidden, gated=True, integers=integers)
    return [*of_gate, *product_tasks(hidden, w2, jobs[1], y, integers=integers)]
