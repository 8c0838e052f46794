"""Makes Triton's interpreter compute on bfloat16 numbers instead of on their bit patterns. Tests only.

The interpreter of triton 3.7 keeps bfloat16 as uint16 and adds, compares and truncates those integers.
Here each operation of the builder that meets bfloat16 decodes its operands to float32, computes, and
encodes the result with round to nearest, ties to even.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def decode(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def encode(numbers: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, rounded to nearest even; NaN stays NaN."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    odd = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _numbers(handle: Any) -> np.ndarray:
    return decode(handle.data) if _is_bf16(handle) and handle.data.dtype == np.uint16 else handle.data


def install() -> None:
    """Patch the interpreter's builder; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bf16", False):
        return
    builder.computes_bf16 = True
    for name, patched in (
        ("binary_op", _binary_op),
        ("unary_op", _unary_op),
        ("create_dot", _create_dot),
        ("cast_impl", _cast),
        ("create_fp_to_fp", _fp_to_fp),
    ):
        setattr(builder, name, patched(getattr(builder, name)))


def _result(array: np.ndarray, dtype: Any) -> Any:
    data = encode(array) if array.dtype == np.float32 and dtype == tl.bfloat16 else array
    return interpreter.TensorHandle(data, dtype)


def _binary_op(original: Callable) -> Callable:
    def binary_op(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return original(self, left, right, operation)
        return _result(operation(_numbers(left), _numbers(right)), left.dtype.scalar)

    return binary_op


def _unary_op(original: Callable) -> Callable:
    def unary_op(self, operand, operation):
        if not _is_bf16(operand):
            return original(self, operand, operation)
        return _result(operation(_numbers(operand)), tl.bfloat16)

    return unary_op


def _create_dot(original: Callable) -> Callable:
    def create_dot(self, left, right, total, precision, max_imprecise):
        if not (_is_bf16(left) or _is_bf16(right)):
            return original(self, left, right, total, precision, max_imprecise)
        product = np.matmul(_numbers(left).astype(np.float32), _numbers(right).astype(np.float32))
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    return create_dot


def _cast(original: Callable) -> Callable:
    def cast(self, source, destination):
        before, after = source.dtype.scalar, destination.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return original(self, source, destination)
        if after == tl.bfloat16:
            return interpreter.TensorHandle(encode(source.data.astype(np.float32)), after)
        numpy_dtype = interpreter._get_np_dtype(destination)
        return interpreter.TensorHandle(_numbers(source).astype(numpy_dtype), after)

    return cast


def _fp_to_fp(original: Callable) -> Callable:
    def fp_to_fp(self, source, destination, rounding):
        narrows = source.dtype.scalar == tl.float32 and destination.scalar == tl.bfloat16
        if not narrows or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(self, source, destination, rounding)
        return interpreter.TensorHandle(encode(source.data), tl.bfloat16)

    return fp_to_fp
