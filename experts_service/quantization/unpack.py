"""From the tensors that a matrix is stored in to `QuantizedWeight`. Knows how each format packs; reads no file.

Codes and zero points get the sign that their middle is 0: 4-bit ones from -8 to 7, 8-bit ones from -128 to 127.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.quantization.scheme import NEIGHBOURS, Awq, Gptq, Packed, Role, Scheme, Values
from cluster.errors import CheckpointError
from experts_service.quantization.weight import QuantizedWeight

# The output that each nibble of an AWQ word is of is 0, 2, 4, 6, 1, 3, 5, 7; so this nibble is of output 0, 1, 2, …
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_WORD_BYTES = 4


def quantized_weight(
    name: str, shape: Shape, scheme: Scheme, parts: Mapping[Role, Tensor], dtype: torch.dtype
) -> QuantizedWeight:
    """The matrix `name` of `shape` [out, in], multiplied in `dtype`, from its parts as they were stored.

    Raises CheckpointError where the numbers contradict the scheme.
    """
    out_features, in_features = shape
    if isinstance(scheme, Values):
        codes, zero_points = parts["codes"], parts.get("zero_points")
        scales = _to_rows(parts["scales"], scheme, out_features)
        zero_points = None if zero_points is None else _to_rows(zero_points, scheme, out_features)
        if zero_points is not None and not scheme.zero_points and zero_points.any():
            raise CheckpointError(
                f"{name!r}: its zero points (weight_zero_point) are not 0 throughout, as quantization_config says with "
                "symmetric: true."
            )
    elif isinstance(scheme, Packed):
        codes, zero_points = unpack_rows(parts["codes"], scheme.bits, in_features), parts.get("zero_points")
        scales = _to_rows(parts["scales"], scheme, out_features)
        if zero_points is not None and scheme.packs_zero_points:
            zero_points = unpack_rows(zero_points.t(), scheme.bits, out_features).t()
        elif zero_points is not None:
            zero_points = _to_rows(zero_points, scheme, out_features)
    elif isinstance(scheme, Gptq):
        codes = unpack_rows(parts["codes"].t(), scheme.bits, in_features)
        scales = parts["scales"].t()
        zero_points = _gptq_zero_points(name, scheme, parts["zero_points"], out_features)
    else:
        codes, scales = unpack_awq(parts["codes"])[:, :out_features].t(), parts["scales"].t()
        zero_points = unpack_awq(parts["zero_points"])[:, :out_features].t()
        if scheme.symmetric and zero_points.any():
            raise _not_the_middle(name, scheme)
    scales = scales.float().contiguous()
    if not scales.isfinite().all():
        raise CheckpointError(f"{name!r}: one of its scales is not a finite number; the file is damaged.")
    if zero_points is not None:
        zero_points = zero_points.to(torch.int16).contiguous() if zero_points.any() else None
    return QuantizedWeight(
        codes=codes.contiguous(),
        scales=scales,
        zero_points=zero_points,
        bits=scheme.bits,
        group_size=scheme.group_size or in_features,
        dtype=dtype,
        input_groups=_input_groups(parts.get("input_groups"), scheme.group_size or in_features),
    )


def unpack_rows(packed: Tensor, bits: int, numbers: int) -> Tensor:
    """int32 [R, words] → int8 [R, numbers]: the first number is in the lowest bits; the middle becomes 0."""
    codes = _bytes(packed)  # [R, words · 4]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return _centred(codes[:, :numbers], bits)


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 [R, words] → int8 [R, words · 8]."""
    codes = _bytes(packed)
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(packed), -1, 8)
    return _centred(nibbles[..., _AWQ_NIBBLES].flatten(-2), 4)


def _bytes(packed: Tensor) -> Tensor:
    """int32 [R, words] → uint8 [R, words · 4], lowest first."""
    return packed.reshape(-1).view(torch.uint8).view(len(packed), -1)


def _centred(codes: Tensor, bits: int) -> Tensor:
    """uint8 from 0 → int8 around 0; 8 bits wrap, which is what they should."""
    return codes.sub(2 ** (bits - 1)).view(torch.int8)


def _to_rows(of_blocks: Tensor, scheme: Values | Packed, out_features: int) -> Tensor:
    """What is of blocks of outputs, of each output [O, G]."""
    rows = scheme.block[0]
    if of_blocks.dim() < 2:
        of_blocks = of_blocks.view(-1, 1)
    if rows == 1:
        return of_blocks
    return of_blocks.repeat_interleave(rows or out_features, dim=0)[:out_features]


def _gptq_zero_points(name: str, scheme: Gptq, packed: Tensor, out_features: int) -> Tensor | None:
    """[O, G], around 0. `gptq` stores them less 1, a word at a time: a borrow goes into the next number of the word."""
    one_each = sum(1 << shift for shift in range(0, 8 * _WORD_BYTES, scheme.bits))
    words = packed.to(torch.int64)
    if scheme.stored_less_one:
        words = words + one_each
    zero_points = unpack_rows(_as_int32(words), scheme.bits, out_features).t()
    if not scheme.symmetric:
        return zero_points
    # Newer writers say `gptq` and store them as they are. Of a symmetric one it is known what they should be.
    stored = unpack_rows(packed, scheme.bits, out_features)
    if zero_points.any() and stored.any():
        raise _not_the_middle(name, scheme)
    return None


def _not_the_middle(name: str, scheme: Gptq | Awq) -> CheckpointError:
    return CheckpointError(
        f"{name!r}: its zero points (qzeros) are not {2 ** (scheme.bits - 1)} throughout, as quantization_config says "
        f"with {scheme.SAYS_SYMMETRIC}."
    )


def _as_int32(words: Tensor) -> Tensor:
    """The lowest 32 bits."""
    return (((words + 2**31) & (2**32 - 1)) - 2**31).to(torch.int32)


def _input_groups(stored: Tensor | None, group_size: int) -> Tensor | None:
    """None where groups are neighbours, as they are without act-order."""
    if stored is None or (stored == NEIGHBOURS).all():
        return None
    neighbours = torch.arange(len(stored)) // group_size
    return None if torch.equal(stored.long(), neighbours) else stored.to(torch.int32)
