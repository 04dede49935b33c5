"""Launcher of `csrc/linear_gelu.cuh`: a few rows, where reading the weights is the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bertgpt.cuda.extension import (
    ACCESS_BYTES,
    DTYPES,
    extension,
    misaligned_names,
    stream_of,
)

MAX_SIZE = 2**31 - 1


def unsupported(call: Mapping[str, Any]) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    x, w, b = call["x"], call["w"], call["b"]
    *outer, inputs = x.shape
    rows, most = math.prod(outer), extension().MAX_LINEAR_ROWS
    if rows > most:
        return f"{rows} rows are more than the {most} whose cost is reading the weights"
    if w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        return f"weight and bias must have x's dtype {x.dtype}"
    if inputs * x.element_size() % ACCESS_BYTES:
        return f"rows of {inputs} inputs are not a multiple of {ACCESS_BYTES} bytes"
    if max(w.shape) > MAX_SIZE // 2:
        return f"a weight of shape {tuple(w.shape)} is too large for its 32-bit counters"
    return misaligned_names({"x": x, "w": w})


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str) -> Tensor:
    """GELU(x wᵀ + b), contiguous, in x's dtype; arguments as the op checked them.

    Args:
        x: [..., E], at most 16 rows.
        w: [F, E].
        b: [F], or None.
        approximate: "none" (erf) or "tanh".
    """
    outputs, inputs = w.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    rows = x if x.dim() == 2 else x.reshape(-1, inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    w = w if w.stride(1) == 1 else w.contiguous()
    b = None if b is None else b.contiguous()
    extension().linear_gelu(
        rows.data_ptr(), w.data_ptr(), 0 if b is None else b.data_ptr(), y.data_ptr(),
        rows.stride(0), w.stride(0), rows.shape[0], inputs, outputs,
        approximate == "tanh", DTYPES[x.dtype], stream_of(x),
    )  # fmt: skip
    return y
