"""Stores new keys and values in their pages.

Maths: k_pages[slot // N, :, slot % N] = k[token], and v alike, for every slot ≥ 0; of tokens with
the same slot the last one stays.

Memory: k, v and the slots written cross HBM once. To find the last token of a slot, each program
reads the slots after its own: T² / 2 comparisons in all, in the L2, far below the copy's time until
T is in the tens of thousands.

Grid: (blocks of BLOCK_T tokens, groups of HEADS heads).

Dims: T tokens, K KV heads, D head_dim padded to BLOCK_D, P pages of N tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bertgpt.kernels.device import compute_capability

_BLOCK_S = 128  # slots compared at a time


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one specialisation; HEADS heads a program."""

    BLOCK_T: int
    HEADS: int
    num_warps: int


def pick_config(
    capability: int, tokens: int, kv_heads: int, head_dim: int, dtype_bytes: int
) -> Config:
    """16 bytes a thread and row for any compute capability; few tokens spread over their heads.

    Args:
        capability: Compute capability (90 = sm_90).
        tokens: T.
        kv_heads: K.
        head_dim: D, 1 … 256.
        dtype_bytes: Size of an element.
    """
    row_threads = max(1, triton.next_power_of_2(head_dim) * dtype_bytes // 16)
    block_t = min(32, max(4, 128 // row_threads))  # 64 × 128 comparisons spill
    heads = 1 if tokens <= 1024 else kv_heads  # many tokens: search each block's slots once
    return Config(BLOCK_T=block_t, HEADS=heads, num_warps=4)


def unsupported(**call: Any) -> str | None:
    """Nothing that the common checks let through."""
    return None


# fmt: off
@triton.jit(do_not_specialize=["num_tokens", "num_kv_heads", "num_slots"])
def _paged_write_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr,
    stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kp, stride_kk, stride_kn,
    stride_vp, stride_vk, stride_vn,
    stride_s,
    num_tokens, num_kv_heads, num_slots,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr,
):
    # fmt: on
    # 1. The slots of this block; −1, which is skipped, past the last token.
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    token = first + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    in_range = token < num_tokens
    slot = tl.load(slots_ptr + token * stride_s, mask=in_range, other=-1).to(tl.int64)

    # 2. A later token with the same slot replaces this one.
    replaced = tl.zeros([BLOCK_T], tl.int32)
    for start in tl.range(first, num_tokens, BLOCK_S):
        later = tl.full([], start, tl.int64) + tl.arange(0, BLOCK_S)
        later_ptrs = slots_ptr + later * stride_s
        later_slot = tl.load(later_ptrs, mask=later < num_tokens, other=-1).to(tl.int64)
        same = (later_slot[None, :] == slot[:, None]) & (later[None, :] > token[:, None])
        replaced = tl.maximum(replaced, tl.max(same.to(tl.int32), 1))
    written = (slot >= 0) & (slot < num_slots) & (replaced == 0)

    # 3. Rows to rows, a head at a time; every offset is 64-bit.
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    offs_d = tl.arange(0, BLOCK_D)
    mask = written[:, None] & (offs_d < HEAD_DIM)[None, :]  # [BLOCK_T, BLOCK_D]
    first_head = tl.program_id(1).to(tl.int64) * HEADS
    for index in tl.range(first_head, tl.minimum(first_head + HEADS, num_kv_heads)):
        head = tl.full([], index, tl.int64)
        k_rows = k_ptr + token * stride_kt + head * stride_kh
        v_rows = v_ptr + token * stride_vt + head * stride_vh
        k = tl.load(k_rows[:, None] + offs_d[None, :], mask=mask)
        v = tl.load(v_rows[:, None] + offs_d[None, :], mask=mask)
        k_out = k_pages_ptr + page * stride_kp + head * stride_kk + offset * stride_kn
        v_out = v_pages_ptr + page * stride_vp + head * stride_vk + offset * stride_vn
        tl.store(k_out[:, None] + offs_d[None, :], k, mask=mask)
        tl.store(v_out[:, None] + offs_d[None, :], v, mask=mask)


def paged_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Copies tokens to their slots, in place; arguments as the op checked them.

    Args:
        k: [T, K, D], unit last stride.
        v: Like k.
        k_pages: [P, K, N, D], any strides with a unit last one.
        v_pages: Like k_pages.
        slots: [T] integers, page · N + offset; negative or out of range: skipped.
    """
    (tokens, kv_heads, dim), (pages, _, page_size, _) = k.shape, k_pages.shape
    if k.numel() == 0 or pages == 0:
        return
    config = pick_config(compute_capability(), tokens, kv_heads, dim, k.element_size())
    grid = (triton.cdiv(tokens, config.BLOCK_T), triton.cdiv(kv_heads, config.HEADS))
    # fmt: off
    _paged_write_kernel[grid](
        k, v, k_pages, v_pages, slots,
        *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
        *slots.stride(),
        tokens, kv_heads, pages * page_size,
        HEAD_DIM=dim, PAGE_SIZE=page_size, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_T=config.BLOCK_T, BLOCK_S=_BLOCK_S, HEADS=config.HEADS, num_warps=config.num_warps,
    )
    # fmt: on
