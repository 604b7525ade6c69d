"""How many bytes weights take in the memory of a process. Plain arithmetic; no torch.

Quantised ones stay as they are where kernels multiply with them, integers in bf16 on a CPU. Elsewhere they are widened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.checkpoint.architecture import Shape, coordinator_tensors, expert_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.layouts import Ref
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.rounding import RoundedRef
from cluster.checkpoint.quantization.scheme import Scheme, Values, num_groups
from cluster.planning.placement import DTYPE_BYTES, Dtype, WeightBytes

SCALE_BYTES, ZERO_POINT_BYTES = 4, 2  # of each group of each output
ROUNDED_SCALE_BYTES = 2  # of a matrix that was rounded while it was read


def held_weights(checkpoint: Checkpoint, dtype: Dtype, device: str) -> WeightBytes:
    """Of a model whose files are here."""
    a = checkpoint.architecture

    def held(names: Iterable[str]) -> int:
        return sum(held_bytes(checkpoint.tensors[name], dtype, device) for name in names)

    experts = [
        sum(held(expert_tensors(a, layer, expert)) for layer in range(a.num_layers)) for expert in range(a.num_experts)
    ]
    return WeightBytes(held(coordinator_tensors(a)), max(experts, default=0))


def held_bytes(ref: Ref | RoundedRef, dtype: Dtype, device: str) -> int:
    """Of one tensor."""
    if isinstance(ref, RoundedRef) and stays_as_it_is(ref.rounding.scheme, dtype, device):
        scheme = ref.rounding.scheme
        groups = ref.shape[0] * num_groups(scheme.group_size, ref.shape[1])
        return math.ceil(math.prod(ref.shape) * scheme.bits / 8) + groups * ROUNDED_SCALE_BYTES
    if not isinstance(ref, QuantizedRef) or not stays_as_it_is(ref.scheme, dtype, device):
        return math.prod(ref.shape) * DTYPE_BYTES[dtype]
    return matrix_bytes(ref.shape, ref.scheme, has_zero_points=ref.has_zero_points)


def held_bits(ref: Ref | RoundedRef, dtype: Dtype, device: str) -> int:
    """Of each number of one tensor."""
    scheme = ref.rounding.scheme if isinstance(ref, RoundedRef) else getattr(ref, "scheme", None)
    if scheme is None or not stays_as_it_is(scheme, dtype, device):
        return 8 * DTYPE_BYTES[dtype]
    return scheme.bits


def matrix_bytes(shape: Shape, scheme: Scheme, *, has_zero_points: bool) -> int:
    """Of one matrix [out, in] in small numbers, as kernels hold it."""
    groups = shape[0] * num_groups(scheme.group_size, shape[1])
    zero_points = ZERO_POINT_BYTES if has_zero_points else 0
    return math.ceil(math.prod(shape) * scheme.bits / 8) + groups * (SCALE_BYTES + zero_points)


def stays_as_it_is(scheme: Scheme, dtype: Dtype, device: str) -> bool:
    """Whether kernels there multiply with the small numbers; else the matrix is widened while it loads."""
    is_float = isinstance(scheme, Values) and scheme.is_float
    return device == "cpu" and dtype == "bfloat16" and not is_float
