"""Launcher of `csrc/paged_decode.cuh`: one new token a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertgpt.cuda.extension import DTYPES, error_flag, extension, misaligned_names, stream_of

HEAD_DIMS = (32, 64, 80, 96, 128)
PAGE_SIZES = range(8, 257)
MAX_KEYS = 2**27  # a split's key positions, at most a 32nd of it doubled, are divided in 32 bits
MAX_ROWS = 2**31 - 1


def unsupported(call: Mapping[str, Any]) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    if call["cu_seqlens_q"] is not None:
        return "it decodes one token a sequence, not chunks (cu_seqlens_q)"
    q, k_pages = call["q"], call["k_pages"]
    tokens, heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    pages, _, page_size, _ = k_pages.shape
    if page_size not in PAGE_SIZES:
        return f"pages of {page_size} tokens are outside 8 … 256"
    _, max_pages = call["page_table"].shape
    if (keys := max_pages * page_size) > MAX_KEYS:
        return f"the page table has room for {keys} keys a sequence, above {MAX_KEYS}"
    if pages > MAX_ROWS:
        return f"the pool has {pages} pages, above {MAX_ROWS}"
    if tokens * heads > MAX_ROWS:
        return f"{tokens} sequences of {heads} heads are above {MAX_ROWS} rows"
    return misaligned_names({"q": q, "k_pages": k_pages, "v_pages": call["v_pages"]})


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    window_left: int = -1,
    scale: float | None = None,
    return_lse: bool = False,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    prefix_keys: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each sequence's newest token to its pages.

    Args:
        q: [B, H, D]; float32, float16 or bfloat16; unit last stride.
        k_pages: [P, K, N, D], any strides with a unit last one.
        v_pages: Like k_pages.
        page_table: [B, max_pages] integers; ids out of range are skipped, and told of by
            `extension.raise_pending`.
        lengths: [B] integers, keys of each sequence with the new one; read on the device.
        window_left: Keys before the newest one to keep, -1 for all.
        scale: Factor of the scores; None is 1 / sqrt(D).
        return_lse: Whether to compute the log-sum-exp.
        new_k: [B, K, D]: the newest tokens' keys. They are attended to and stored in their pages
            in the same launch, which then need not hold them. None: the pages hold them.
        new_v: The values, likewise.
        prefix_keys: How many leading keys all sequences share, in the pages that the first row of
            the table names: they are read once for several sequences. No length may be below it.
            0: none.

    Returns:
        out like q, contiguous, and lse float32 [H, B] (natural log) or None.

    Raises:
        ValueError: A window together with a shared prefix, or one longer than the table; one of
            new_k and new_v alone, or of another shape, dtype or device than they should have, or
            with rows that do not start at multiples of 16 bytes.
        RuntimeError: The driver or the launch failed.
    """
    (batch, heads, dim), (pages, kv_heads, page_size, _) = q.shape, k_pages.shape
    max_pages = page_table.shape[1]
    longest = max_pages * page_size
    if window_left >= 0 and prefix_keys > 0:
        raise ValueError("a window and a shared prefix exclude each other")
    if not 0 <= prefix_keys <= longest:
        raise ValueError(f"prefix_keys is {prefix_keys}, but the page table holds {longest} keys")
    if (new_k is None) != (new_v is None):
        raise ValueError("new_k and new_v go together")
    new_at: tuple[int, ...] = (0, 0)
    new_strides: tuple[int, ...] = (0, 0, 0, 0)
    if new_k is not None and new_v is not None:
        _check_new("new_k", new_k, q, kv_heads)
        _check_new("new_v", new_v, q, kv_heads)
        new_at = (new_k.data_ptr(), new_v.data_ptr())
        new_strides = (*new_k.stride()[:2], *new_v.stride()[:2])
    kernels = extension()
    window_left = -1 if window_left >= longest else window_left
    own = longest if window_left < 0 else min(longest, window_left + 1)
    splits = max(1, min(kernels.MAX_SPLITS, -(-own // kernels.MIN_SPLIT_KEYS)))
    slots = splits + (kernels.count_splits(prefix_keys) if prefix_keys else 0)

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, batch, device=q.device) if return_lse else None
    parts_at = (0, 0)
    if slots > 1:
        part = torch.empty(batch, heads, slots, dim, device=q.device)
        part_lse = torch.empty(batch, heads, slots, device=q.device)
        parts_at = (part.data_ptr(), part_lse.data_ptr())
    kernels.paged_decode(
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(),
        lengths.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), *parts_at,
        *new_at, error_flag(q),
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], *new_strides,
        *page_table.stride(), lengths.stride(0), pages, batch, heads, kv_heads, dim, page_size,
        max_pages, window_left, prefix_keys, slots, dim**-0.5 if scale is None else scale,
        page_table.dtype == torch.int64, lengths.dtype == torch.int64, DTYPES[q.dtype],
        stream_of(q),
    )  # fmt: skip
    return out, lse


def _check_new(name: str, rows: Tensor, q: Tensor, kv_heads: int) -> None:
    shape = (q.shape[0], kv_heads, q.shape[2])
    if (rows.shape, rows.dtype, rows.device) != (shape, q.dtype, q.device):
        raise ValueError(
            f"{name} must be [B, K, D] = {shape}, {q.dtype} on {q.device}, not "
            f"{tuple(rows.shape)}, {rows.dtype} on {rows.device}"
        )
    if rows.stride(-1) != 1:
        raise ValueError(f"{name} must have last stride 1, not strides {rows.stride()}")
    if (reason := misaligned_names({name: rows})) is not None:
        raise ValueError(f"{reason}; copy it (.clone())")
