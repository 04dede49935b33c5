"""Makes bfloat16 right in Triton's interpreter (TRITON_INTERPRET=1); on a GPU nothing uses this.

The interpreter keeps bfloat16 as uint16 bit patterns and computes on them as if they were
integers: dots and arithmetic are wrong, and float32 → bfloat16 truncates. `repair_bfloat16` wraps
the interpreter's builder so that each operation widens bfloat16 operands to float32, computes, and
rounds the result to nearest even: what the hardware does. It also gives `tl.maximum` and
`tl.minimum` their compiled meaning, in which a number wins over NaN.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

_ARITHMETIC = ("binary_op", "unary_op", "ternary_op")  # called as (operands …, numpy function)
_WHOLE = ("create_fma", "create_rsqrt", "create_erf", "create_fabs")  # called as (operands …)
_CASTS = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) → float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Floats → bfloat16 bit patterns (uint16), to nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair_bfloat16() -> None:
    """Repairs the interpreter of this process; a second call changes nothing."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    for name in (*_ARITHMETIC, *_WHOLE):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    for name in _CASTS:
        setattr(InterpreterBuilder, name, _cast)
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    ReduceScanOpInterface.apply = _reduction(ReduceScanOpInterface.apply)
    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        narrow(np.array([value], dtype=np.float32)), tl.bfloat16
    )


def _is_bfloat16(handle: Any) -> bool:
    # A comparison's result keeps its operands' Triton type but holds booleans.
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(operand: Any) -> Any:
    if isinstance(operand, TensorHandle) and _is_bfloat16(operand):
        return TensorHandle(widen(operand.data), tl.float32)
    return operand


def _narrowed(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(narrow(handle.data), tl.bfloat16)


def _in_float32(compute: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The operation on bfloat16 handles computed in float32 and rounded once."""

    def wrapped(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(isinstance(x, TensorHandle) and _is_bfloat16(x) for x in operands):
            return compute(self, *operands)
        return _narrowed(compute(self, *(_widened(x) for x in operands)))

    return wrapped


def _cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    source = _widened(source)
    if target.scalar == tl.bfloat16:
        return TensorHandle(narrow(source.data), tl.bfloat16)
    return self.cast_impl(source, target)


def _fp_to_fp(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wrapped(
        self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any
    ) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return _cast(self, source, target)
        return original(self, source, target, rounding)

    return wrapped


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wrapped(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any
    ) -> TensorHandle:
        return original(self, _widened(a), _widened(b), *rest)

    return wrapped


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction or scan of bfloat16 tensors carried in float32 and rounded at the end."""

    def wrapped(self: ReduceScanOpInterface, operand: Any) -> Any:
        if not isinstance(operand, tl.tensor) or operand.dtype != tl.bfloat16:
            return original(self, operand)
        wide = tl.float32
        if operand.type.is_block():
            wide = tl.block_type(tl.float32, operand.type.shape)
        result = original(self, tl.tensor(_widened(operand.handle), wide))
        narrow_type: Any = tl.bfloat16
        if result.type.is_block():
            narrow_type = tl.block_type(tl.bfloat16, result.type.shape)
        return tl.tensor(_narrowed(result.handle), narrow_type)

    return wrapped
