"""Makes Triton's interpreter compute in bf16 what a GPU does. Imported for its effect, by the tests of kernels.

Its numbers in bf16 are their 16 bits as integers (Triton 3.7): products of them are products of those. And it cuts off
what float32 has more, where a GPU rounds to the nearest. And what it makes of integers in bf16 are their lower bits.
"""

from __future__ import annotations

import os

import numpy as np

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _create_dot, _create_fp_trunc = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def _widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot_of_widened(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        """In float64: numpy's product of float32 rounds a row by how many there are, on some CPUs."""
        a, b = _widened(a), _widened(b)
        if a.dtype.scalar != tl.float32 or b.dtype.scalar != tl.float32:
            return _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def _rounded(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _create_fp_trunc(self, src, dst_type)
        numbers = np.ascontiguousarray(src.data)
        bits = numbers.view(np.uint32).astype(np.uint64)
        to_even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return TensorHandle(np.where(np.isnan(numbers), 0x7FC0, to_even).astype(np.uint16), tl.bfloat16)

    def _from_integers(create):  # type: ignore[no-untyped-def]
        def created(self, src, dst_type):  # type: ignore[no-untyped-def]
            if dst_type.scalar != tl.bfloat16:
                return create(self, src, dst_type)
            return _rounded(self, TensorHandle(src.data.astype(np.float32), tl.float32), dst_type)

        return created

    InterpreterBuilder.create_si_to_fp = _from_integers(InterpreterBuilder.create_si_to_fp)
    InterpreterBuilder.create_ui_to_fp = _from_integers(InterpreterBuilder.create_ui_to_fp)
    InterpreterBuilder.create_dot = _dot_of_widened
    InterpreterBuilder.create_fp_trunc = _rounded
