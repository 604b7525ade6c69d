"""Makes Triton's interpreter multiply what a GPU multiplies. Imported for its effect, by the tests of kernels.

Its numbers in bf16 are their 16 bits as integers (Triton 3.7): products of them are products of those.
"""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _create_dot = InterpreterBuilder.create_dot

    def _widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot_of_widened(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = _dot_of_widened
