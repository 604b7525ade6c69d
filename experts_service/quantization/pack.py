"""From `QuantizedWeight` to what compressed-tensors stores of it: the inverse of unpack.py. Writes no file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint.quantization.scheme import WORD_BITS, Role
from experts_service.quantization.weight import QuantizedWeight


def stored_parts(weight: QuantizedWeight, scale_dtype: torch.dtype) -> Mapping[Role, Tensor]:
    """Its parts as scheme.py has them: integers packed into int32, FP8 as it is."""
    scales = weight.scales.to(scale_dtype)
    if weight.codes.dtype is not torch.int8:
        return {"codes": weight.codes, "scales": scales}
    return {
        "codes": pack_rows(weight.codes, weight.bits),
        "scales": scales,
        "shape": torch.tensor(weight.shape),
    }


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 [R, numbers], the middle at 0 → int32 [R, words]: the first number is in the lowest bits."""
    octets = codes.view(torch.uint8).add(2 ** (bits - 1))  # 8 bits wrap, which is what they should
    octets = F.pad(octets, (0, -codes.shape[1] % (WORD_BITS // bits)))
    if bits == 4:
        octets = octets[:, ::2] | octets[:, 1::2] << 4
    return octets.view(torch.int32)
