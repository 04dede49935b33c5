"""Launcher of `csrc/add_layer_norm.cuh`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertgpt.cuda.extension import (
    ACCESS_BYTES,
    DTYPES,
    extension,
    misaligned_names,
    stream_of,
)


def unsupported(call: Mapping[str, Any]) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    x, residual, weight, bias = call["x"], call["residual"], call["weight"], call["bias"]
    width, widest = x.shape[-1], extension().MAX_NORM_WIDTH
    if width > widest:
        return f"rows of {width} columns do not fit registers (at most {widest})"
    if width * x.element_size() % ACCESS_BYTES:
        return f"rows of {width} columns are not a multiple of {ACCESS_BYTES} bytes"
    if bias is not None and bias.dtype != weight.dtype:
        return "weight and bias differ in dtype"
    return misaligned_names({"x": x, "residual": residual, "weight": weight, "bias": bias})


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm(dropout(x) + residual) over the last dimension, and the sum.

    Args:
        x: [..., E], any strides.
        residual: Like x, or None.
        weight: [E], x's dtype or float32.
        bias: [E], weight's dtype, or None.
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of x.
        seed: 0-dim int64; on x's device the kernel reads it there, on the CPU it is read now.
        return_sum: Whether to store the sum.

    Returns:
        Both contiguous, in x's dtype; the sum is None unless asked for.
    """
    width = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if return_sum else None
    if y.numel() == 0:
        return y, total
    rows = _as_rows(x)
    added = None if residual is None else _as_rows(residual)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    seed_at, seed_value = 0, 0
    if seed is not None and seed.device == x.device and x.device.type == "cuda":
        seed_at = seed.data_ptr()
    elif seed is not None:
        seed_value = int(seed)
    keep = 1.0 - dropout_p
    extension().add_layer_norm(
        rows.data_ptr(), 0 if added is None else added.data_ptr(), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(),
        0 if total is None else total.data_ptr(), seed_at, seed_value, rows.shape[0],
        rows.stride(0), 0 if added is None else added.stride(0),
        math.floor(dropout_p * 2**32), 1.0 / keep if keep else 0.0, eps,
        width, weight.dtype != x.dtype, DTYPES[x.dtype], stream_of(x),
    )  # fmt: skip
    return y, total


def _as_rows(tensor: Tensor) -> Tensor:
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.is_contiguous() or rows.stride(1) == 1 else rows.contiguous()
