"""Launcher of `csrc/paged_write.cuh`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertgpt.cuda.extension import error_flag, extension, stream_of

MAX_SLOTS = 2**31 - 1
MAX_TOKENS = 2**31 - 1  # the grid's


def unsupported(call: Mapping[str, Any]) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    (tokens, _, _), (pages, _, page_size, _) = call["k"].shape, call["k_pages"].shape
    if pages * page_size > MAX_SLOTS:
        return f"the pool has {pages * page_size} slots, above {MAX_SLOTS}"
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens are above {MAX_TOKENS}"
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
        for stride in (
            *k.stride()[:2],
            *v.stride()[:2],
            *k_pages.stride()[:3],
            *v_pages.stride()[:3],
        )
    ]
    addresses = (k.data_ptr(), v.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr())
    common = math.gcd(head_dim * size, *strides, *addresses)
    access = 16 if common % 16 == 0 else 4 if common % 4 == 0 else 2
    extension().paged_write(
        *addresses, slots.data_ptr(), error_flag(k), *strides, slots.stride(0), tokens,
        pages, kv_heads, page_size, head_dim * size, access, slots.dtype == torch.int64,
        stream_of(k),
    )  # fmt: skip
