"""Finds quantised matrices of any family among the stored tensors, by names, dtypes and shapes. Knows no family.

A family of ours says which matrices it has, and they are looked for. Here nobody says: what is stored decides, and the
rest of the checkpoint is what was used for no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.checkpoint.architecture import Shape
from cluster.checkpoint.json_document import JsonDocument
from cluster.checkpoint.quantization.config import Quantization, read_quantization
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef, locate_quantized
from cluster.checkpoint.quantization.scheme import WORD_BITS, Gptq, Packed, Scheme, Values
from cluster.checkpoint.safetensors_header import StoredTensor
from cluster.checkpoint.tensor_ref import Source, TensorRef
from cluster.errors import CheckpointError

MXFP4 = "mxfp4"  # of `quant_method`
MXFP4_GROUP = 32  # inputs of a scale
_CODES, _SCALES = "_blocks", "_scales"
_MXFP4_KEYS = frozenset(("quant_method", "modules_to_not_convert", "dequantize"))


@dataclass(frozen=True, slots=True)
class Mxfp4Ref:
    """Where the matrices of a layer's experts lie in MXFP4: floats of 4 bits, with a power of two for each 32 inputs.

    codes     [E, out, in / 32, 16]  two in a byte, the first in the lower bits
    scales    [E, out, in / 32]      exponents, 127 more than they are
    """

    name: str  # of the tensor that they would be in bf16
    shape: Shape  # [E, in, out], as gpt-oss multiplies
    codes: TensorRef
    scales: TensorRef

    @property
    def nbytes(self) -> int:
        """Of what is read of it."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The byte ranges that it is read from."""
        return (self.codes, self.scales)

    def of_expert(self, expert: int) -> Mxfp4Ref:
        """That of one: [1, in, out]."""
        parts = (
            replace(
                part,
                shape=(1, *part.shape[1:]),
                offset=part.offset + expert * (part.nbytes // self.shape[0]),
                nbytes=part.nbytes // self.shape[0],
            )
            for part in self.stored
        )
        return Mxfp4Ref(self.name, (1, *self.shape[1:]), *parts)

    def __str__(self) -> str:
        return "MXFP4"


def quantized_matrices(
    config: JsonDocument, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, QuantizedRef | Mxfp4Ref], set[str]]:
    """By the names that they would have in bf16; and the names of all tensors that were used for them.

    Raises CheckpointError: a method that is not read, or a part that is missing or of another shape.
    """
    if not config.has("quantization_config"):
        return {}, set()
    section = config.section("quantization_config")
    matrices: dict[str, QuantizedRef | Mxfp4Ref] = {}
    if section.values.get("quant_method") == MXFP4:
        for key in section.values.keys() - _MXFP4_KEYS:
            raise section.error(key, "is not known to Manta and may change what the numbers mean")
        matrices.update((ref.name, ref) for ref in _microscaled(stored))
    elif (quantization := read_quantization(config)) is not None:
        matrices.update((ref.name, ref) for ref in _quantized(quantization, stored))
    if not matrices:
        method = section.values.get("quant_method")
        raise section.error("quant_method", f"is {method!r}, and no matrix is stored so")
    return matrices, {part.name for ref in matrices.values() for part in ref.stored}


def _microscaled(stored: Mapping[str, StoredTensor]) -> Iterator[Mxfp4Ref]:
    for name, codes in stored.items():
        base = name.removesuffix(_CODES)
        if base == name or codes.dtype != "U8":
            continue
        scales = stored.get(base + _SCALES)
        if scales is None:
            raise CheckpointError(f"{codes.file} has {name!r} and no file has {base + _SCALES!r}.")
        if len(codes.shape) != 4 or codes.shape[3] * 2 != MXFP4_GROUP:
            raise CheckpointError(
                f"{codes.file}: tensor {name!r} has shape {codes.shape}; expected (E, out, in / 32, 16)."
            )
        if scales.dtype != "U8" or scales.shape != codes.shape[:3]:
            raise CheckpointError(
                f"{scales.file}: tensor {base + _SCALES!r} is {scales.dtype} {scales.shape}; expected U8 "
                f"{codes.shape[:3]}."
            )
        experts, outputs, groups, _ = codes.shape
        yield Mxfp4Ref(base, (experts, groups * MXFP4_GROUP, outputs), _ref(name, codes), _ref(base + _SCALES, scales))


def _quantized(quantization: Quantization, stored: Mapping[str, StoredTensor]) -> Iterator[QuantizedRef]:
    for name, codes in stored.items():
        module, _, suffix = name.rpartition(".")
        if len(codes.shape) != 2 or suffix not in ("weight", "weight_packed", "qweight"):
            continue
        shapes = {one: _shape(one, suffix, codes) for one in quantization.schemes_of([module], {"Linear"})}
        schemes = [scheme for scheme, shape in shapes.items() if shape is not None]
        shape = next((shape for shape in shapes.values() if shape is not None), None)
        source = f"{module}.weight"
        if shape is not None and (ref := locate_quantized(source, shape, schemes, [Source(source, shape)], stored)):
            yield ref


def _shape(scheme: Scheme, suffix: str, codes: StoredTensor) -> Shape | None:
    """Of the matrix [out, in] whose numbers these are; None: not in this scheme."""
    rows, columns = codes.shape
    per_word = WORD_BITS // scheme.bits
    if isinstance(scheme, Values):
        return codes.shape if suffix == "weight" and codes.dtype in ("F8_E4M3", "I8") else None
    if isinstance(scheme, Packed):
        return (rows, columns * per_word) if suffix == "weight_packed" else None
    if suffix != "qweight":
        return None
    return (columns, rows * per_word) if isinstance(scheme, Gptq) else (columns * per_word, rows)


def _ref(name: str, tensor: StoredTensor) -> TensorRef:
    return TensorRef(name, tensor.file, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
