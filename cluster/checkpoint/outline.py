"""A checkpoint as far as its sizes go: names, shapes and formats of a model whose files are not here. Reads nothing.

Experts and attention's projections are quantised; embeddings, head, norms and gates are not, as quantisers leave them.
"""

from __future__ import annotations

import math
from pathlib import Path

from cluster.checkpoint.architecture import Architecture, Shape, all_tensors
from cluster.checkpoint.checkpoint import Checkpoint
from cluster.checkpoint.configuration.generation_config import GenerationConfig
from cluster.checkpoint.layouts import Ref
from cluster.checkpoint.quantization.quantized_ref import QuantizedRef
from cluster.checkpoint.quantization.scheme import READ, Awq, Gptq, Scheme, Values
from cluster.checkpoint.safetensors_header import ITEM_BYTES
from cluster.checkpoint.tensor_ref import TensorRef

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def outline(name: str, architecture: Architecture, scheme: Scheme | None = None) -> Checkpoint:
    """Of a model in the dtype that its config says, or quantised. It has no fingerprint, and no process can open it.

    `name` is what messages call it, in place of a directory.
    """
    tensors = {of: _ref(of, shape, architecture, scheme) for of, shape in all_tensors(architecture).items()}
    return Checkpoint(Path(name), "huggingface", architecture, tensors, "", GenerationConfig())


def _ref(name: str, shape: Shape, architecture: Architecture, scheme: Scheme | None) -> Ref:
    if scheme is None or len(shape) == 1 or not (".experts." in name or ".self_attn." in name or ".mlp." in name):
        return _plain(name, _DTYPES[architecture.dtype], shape)
    parts = {
        part.role: _plain(name, _scale_dtype(scheme) if part.role == "scales" else part.dtypes[0], part.shapes[0])
        for part in scheme.parts(*shape)
        if part.needed and part.role in READ
    }
    return QuantizedRef(name, shape, scheme, parts)


def _scale_dtype(scheme: Scheme) -> str:
    """As who makes such checkpoints stores them."""
    if isinstance(scheme, Gptq | Awq):
        return "F16"
    return "F32" if isinstance(scheme, Values) and scheme.block[1] is not None else "BF16"


def _plain(name: str, dtype: str, shape: Shape) -> TensorRef:
    return TensorRef(name, Path(name), dtype, shape, 0, math.prod(shape) * ITEM_BYTES[dtype])
