"""How many bytes weights take in the memory of a process. Plain arithmetic; no torch.

Quantised ones stay as they are where kernels multiply with them: in bf16 on a CPU, and on a GPU. Elsewhere they are
widened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.checkpoint.architecture import Shape, coordinator_tensors, expert_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.configuration.any_architecture import divided
from cluster.checkpoint.layouts import Ref
from cluster.checkpoint.quantization.any_matrix import Mxfp4Ref
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.rounding import RoundedRef
from cluster.checkpoint.quantization.scheme import Scheme, Values, num_groups
from cluster.checkpoint.tensor_ref import TensorRef
from cluster.planning.placement import DTYPE_BYTES, Dtype, WeightBytes

ZERO_POINT_BYTES = 2  # of each group of each output
SCALE_BYTES, NARROW_SCALE_BYTES = 4, 2  # the same, and where bf16 holds them exactly
GPU_STEP = {8: 16, 4: 32}  # by bits: inputs that a GPU's kernels take at least, to which groups are filled up
NARROW_SCALES = ("BF16", "F8_E8M0")  # as they are stored; of others nobody knows before they are read


def held_weights(checkpoint: Checkpoint, dtype: Dtype, device: str) -> WeightBytes:
    """Of a model whose files are here."""
    a = checkpoint.architecture
    if checkpoint.model_impl == "transformers":
        # transformers multiplies with plain numbers: what is stored in fewer bits is widened.
        sizes = {
            name: (ref.shape, math.prod(ref.shape) * DTYPE_BYTES[dtype]) for name, ref in checkpoint.tensors.items()
        }
        of = divided(sizes, a)
        return WeightBytes(of.own, of.expert + of.shared)  # little: it is counted with each of them

    def held(names: Iterable[str]) -> int:
        return sum(held_bytes(checkpoint.tensors[name], dtype, device) for name in names)

    experts = [
        sum(held(expert_tensors(a, layer, expert)) for layer in range(a.num_layers)) for expert in range(a.num_experts)
    ]
    return WeightBytes(held(coordinator_tensors(a)), max(experts, default=0))


def held_bytes(ref: Ref | RoundedRef, dtype: Dtype, device: str) -> int:
    """Of one tensor."""
    scheme: Scheme
    if isinstance(ref, RoundedRef):
        scheme, has_zero_points = ref.rounding.scheme, False
        has_narrow_scales = not isinstance(scheme, Values)
    elif isinstance(ref, QuantizedRef):
        scheme, has_zero_points = ref.scheme, ref.has_zero_points
        has_narrow_scales = ref.parts["scales"].dtype in NARROW_SCALES
    if isinstance(ref, TensorRef | Mxfp4Ref) or not _stays_as_it_is(ref.shape, scheme, dtype, device):
        return math.prod(ref.shape) * DTYPE_BYTES[dtype]
    of_group = NARROW_SCALE_BYTES if has_narrow_scales else SCALE_BYTES
    if has_zero_points:
        of_group += ZERO_POINT_BYTES
    groups_of_row = num_groups(scheme.group_size, ref.shape[1])
    width = ref.shape[1]
    if device != "cpu" and groups_of_row > 1:
        step = GPU_STEP[scheme.bits]
        width = groups_of_row * -(-(scheme.group_size or width) // step) * step
    return math.ceil(ref.shape[0] * width * scheme.bits / 8) + ref.shape[0] * groups_of_row * of_group


def held_bits(ref: Ref | RoundedRef, dtype: Dtype, device: str) -> int:
    """Of each number of one tensor."""
    scheme = ref.rounding.scheme if isinstance(ref, RoundedRef) else getattr(ref, "scheme", None)
    if scheme is None or not _stays_as_it_is(ref.shape, scheme, dtype, device):
        return 8 * DTYPE_BYTES[dtype]
    return int(scheme.bits)


def _stays_as_it_is(shape: Shape, scheme: Scheme, dtype: Dtype, device: str) -> bool:
    """Whether kernels there multiply with the small numbers; else the matrix is widened while it loads."""
    if device != "cpu":
        return True
    if dtype != "bfloat16":
        return False
    block = min(scheme.group_size or shape[1], shape[1])
    return not isinstance(scheme, Values) or not scheme.is_float or (block % 2 == 0 and shape[1] % block == 0)
