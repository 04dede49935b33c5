"""Launcher of `csrc/paged_write.cuh`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bertgpt.cuda.extension import error_flag, extension, stream_of

MAX_SLOTS = 2**31 - 1
MAX_TOKENS = 2**31 - 1  # the grid's


def unsupported(*, k: Tensor, k_pages: Tensor, **call: Any) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    slots = k_pages.shape[0] * k_pages.shape[2]
    if slots > MAX_SLOTS:
        return f"the pool has {slots} slots, above {MAX_SLOTS}"
    if k.shape[0] > MAX_TOKENS:
        return f"{k.shape[0]} tokens are above {MAX_TOKENS}"
    return None


def paged_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Copies tokens to their slots, in place; arguments as the op checked them.

    Args:
        k: [T, K, D], unit last stride.
        v: Like k.
        k_pages: [P, K, N, D], any strides with a unit last one.
        v_pages: Like k_pages.
        slots: [T] integers, page · N + offset; negative: skipped; past the end: skipped and told of
            by `extension.raise_pending`.
    """
    (tokens, kv_heads, head_dim), (pages, _, page_size, _) = k.shape, k_pages.shape
    if k.numel() == 0:
        return
    size = k.element_size()
    strides = [
        stride * size
        for tensor, dims in ((k, 2), (v, 2), (k_pages, 3), (v_pages, 3))
        for stride in tensor.stride()[:dims]
    ]
    addresses = [t.data_ptr() for t in (k, v, k_pages, v_pages)]
    common = math.gcd(head_dim * size, *strides, *addresses)
    access = next(width for width in (16, 4, 2) if common % width == 0)
    extension().paged_write(
        *addresses, slots.data_ptr(), error_flag(k.device), *strides, slots.stride(0), tokens,
        pages, kv_heads, page_size, head_dim * size, access, slots.dtype == torch.int64,
        stream_of(k.device),
    )  # fmt: skip
