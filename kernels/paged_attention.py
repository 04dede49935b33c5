"""Paged attention: decoding, and chunks of a prompt, straight from the pool of KV pages.

Maths: s = scale · q kᵀ over the keys a query may see; out = softmax(s) v, lse = ln Σ exp(s), in one
pass over key blocks with a running maximum and sum (FlashAttention-2, arXiv:2307.08691). The keys
of a sequence are cut into splits of SPLIT_KEYS, which `merge_splits` puts together.

Memory: pages in use cross HBM once for each tile of BLOCK_M rows, where the rows of a tile are the
tokens × query heads that share one KV head; q and out once; with splits, float32 partial results
once out and once in. Page ids are read one block ahead, so keys never wait for the page table.

Grid: one axis of sequences · KV heads · splits · tiles of rows, tiles fastest (they read the same
keys), last tiles first (they see most keys). Its size follows the table's width; lengths are read
on the device, so a captured launch stays right as sequences grow, and work without keys ends at
once.

Bits: splits and blocks start at fixed key positions and a split's size depends neither on the batch
nor on the machine's size, so a sequence gives the same bits alone, in any batch and on any pages.
`pick_config` names what its size does depend on.

Dims: B sequences, T tokens, H query heads, K KV heads, D head_dim padded to BLOCK_D, P pages of N.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.merge_splits import merge_splits
from bertgpt.kernels.primitives import LN2, LOG2E, packed_span, softmax_step

MAX_KEYS = 2**30  # of one sequence: key positions and window bounds are int32
_SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # of a block at most, from there on


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one specialisation; SPLIT_KEYS 0 does not split."""

    BLOCK_M: int
    BLOCK_N: int
    SPLIT_KEYS: int
    num_warps: int
    num_stages: int


def pick_config(
    capability: int, head_dim: int, dtype_bytes: int, rows: int, max_keys: int
) -> Config:
    """Tile shape for a compute capability (90 = sm_90) and a call.

    Rows beyond one tile are not split: tiles already give enough work. A split covers 32 · BLOCK_M
    keys, doubled until 1024 / BLOCK_M of them cover the table, which bounds the workspace at 1024
    float32 rows a sequence and KV head.

    Args:
        capability: Compute capability.
        head_dim: D, 1 … 256.
        dtype_bytes: Size of an element of q and the pages.
        rows: max_seqlen_q · H / K.
        max_keys: Keys that the page table has room for.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    exact = dtype_bytes == 4  # products without tensor cores: operands live in registers
    wide = exact and block_d > 64  # the least tile is what fits them
    largest = 64 if not exact else 16 if wide else 32
    block_m = min(largest, max(16, triton.next_power_of_2(rows)))
    split_keys = 0
    if rows <= block_m:
        split_keys = 32 * block_m
        while split_keys * (1024 // block_m) < max_keys:
            split_keys *= 2
    crowded = block_m == 64 and block_d >= 128 and capability // 10 not in (9, 10)
    block_n = 16 if wide else 32 if exact or crowded else 64
    stage_kib = max(1, 2 * block_n * block_d * dtype_bytes // 1024)
    shared_kib = _SHARED_KIB[max(c for c in _SHARED_KIB if c <= capability)]
    num_stages = max(2, min(2 if wide else 4, shared_kib // 2 // stage_kib))
    num_warps = 8 if block_d * dtype_bytes >= 512 or (exact and block_m == 32) else 4
    return Config(block_m, block_n, split_keys, num_warps, num_stages)


def unsupported(*, k_pages: torch.Tensor, page_table: torch.Tensor, **call: Any) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    keys = page_table.shape[1] * k_pages.shape[2]
    if keys > MAX_KEYS:
        return f"the page table has room for {keys} keys a sequence, above {MAX_KEYS}"
    return None


@triton.jit
def _page_ids(table_ptr, stride_t, keys, hi, PAGE_SIZE: tl.constexpr):
    """Ids (int64) of the pages that hold `keys`; −1, which is no page, at and past `hi`."""
    entry = (keys // PAGE_SIZE).to(tl.int64)
    return tl.load(table_ptr + entry * stride_t, mask=keys < hi, other=-1).to(tl.int64)


# fmt: off
@triton.jit(do_not_specialize=[
    "num_tokens", "num_kv_heads", "num_pages", "max_pages", "num_tiles", "num_splits",
    "window_left", "window_right",
])
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, cu_q_ptr,
    out_ptr,  # [num_splits, T, H, D], of q's dtype when num_splits is 1, else float32
    lse_ptr,  # [num_splits, H, T] float32
    stride_qt, stride_qh,
    stride_kp, stride_kk, stride_kn,
    stride_vp, stride_vk, stride_vn,
    stride_tb, stride_tp,
    num_tokens, num_kv_heads, num_pages, max_pages, num_tiles, num_splits,
    scale_log2, window_left, window_right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    # 1. This program's sequence, KV head, split and tile of rows.
    pid = tl.program_id(0)
    tile = num_tiles - 1 - pid % num_tiles
    pid //= num_tiles
    split = pid % num_splits
    pid //= num_splits
    kv_head = (pid % num_kv_heads).to(tl.int64)
    seq = (pid // num_kv_heads).to(tl.int64)
    start_q = seq
    len_q = 1
    if cu_q_ptr is not None:
        start_q, len_q = packed_span(cu_q_ptr, seq, num_tokens)
    row_first = tile * BLOCK_M
    if row_first >= len_q * GROUP:
        return
    length = tl.load(lengths_ptr + seq).to(tl.int64)
    length = tl.minimum(tl.maximum(length, 0), max_pages.to(tl.int64) * PAGE_SIZE).to(tl.int32)
    split_lo = 0
    split_hi = length
    if SPLIT_KEYS > 0:
        split_lo = split * SPLIT_KEYS
        split_hi = tl.minimum(length, split_lo + SPLIT_KEYS)
        if (split > 0) & (split_lo >= length):
            return  # the merge asks only for splits below the length

    # 2. Keys [lo, hi) of the split are seen by some row of the tile. Query i sits on key
    # i + diagonal: the last query meets the last key.
    diagonal = length - len_q
    rows = row_first + tl.arange(0, BLOCK_M)
    tokens = rows // GROUP
    mask_m = tokens < len_q
    lo = split_lo
    hi = split_hi
    if HAS_LEFT:
        lo = tl.maximum(lo, row_first // GROUP + diagonal - window_left)
    if HAS_RIGHT:
        last = tl.minimum((row_first + BLOCK_M - 1) // GROUP, len_q - 1)
        hi = tl.minimum(hi, last + diagonal + window_right + 1)

    # 3. Queries, and pointers to this head's rows of a page; every offset is 64-bit.
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    token = start_q + tokens  # [BLOCK_M]
    head = kv_head * GROUP + rows % GROUP
    mask_q = mask_m[:, None] & mask_d[None, :]
    q_ptrs = q_ptr + (token * stride_qt + head * stride_qh)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_ptrs = k_ptr + kv_head * stride_kk + offs_d[None, :]
    v_ptrs = v_ptr + kv_head * stride_vk + offs_d[None, :]
    table_ptr += seq * stride_tb
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # 4. Key blocks, aligned to BLOCK_N. A block inside one page needs one id, else one a key.
    begin = lo // BLOCK_N * BLOCK_N
    ahead = begin if PAGE_SIZE % BLOCK_N == 0 else begin + offs_n
    next_page = _page_ids(table_ptr, stride_tp, ahead, hi, PAGE_SIZE)
    for start in tl.range(begin, hi, BLOCK_N):
        page = next_page
        ahead += BLOCK_N
        next_page = _page_ids(table_ptr, stride_tp, ahead, hi, PAGE_SIZE)
        keys = start + offs_n
        slot = (keys % PAGE_SIZE).to(tl.int64)
        seen = (keys >= lo) & (keys < hi) & (page >= 0) & (page < num_pages)  # [BLOCK_N]
        mask_kv = seen[:, None] & mask_d[None, :]
        k_rows = k_ptrs + (page * stride_kp + slot * stride_kn)[:, None]
        k = tl.load(k_rows, mask=mask_kv, other=0.0)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        visible = seen[None, :] & mask_m[:, None]  # [BLOCK_M, BLOCK_N]
        if HAS_RIGHT:
            visible &= keys[None, :] <= tokens[:, None] + (diagonal + window_right)
        if HAS_LEFT:
            visible &= keys[None, :] >= tokens[:, None] + (diagonal - window_left)
        scores = tl.where(visible, scores, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i, 1.0, False)
        v_rows = v_ptrs + (page * stride_vp + slot * stride_vn)[:, None]
        v = tl.load(v_rows, mask=mask_kv, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    # 5. A row without a key has l = 0: zeros, and −inf.
    keyless = l_i == 0.0
    l_safe = tl.where(keyless, 1.0, l_i)
    out = tl.where(keyless[:, None], 0.0, acc / l_safe[:, None])
    num_heads = num_kv_heads * GROUP
    split_token = split.to(tl.int64) * num_tokens + token
    out_ptrs = out_ptr + ((split_token * num_heads + head) * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q)
    if lse_ptr is not None:
        lse = tl.where(keyless, float("-inf"), m_i * LN2 + tl.log(l_safe))
        split_head = split.to(tl.int64) * num_heads + head
        tl.store(lse_ptr + split_head * num_tokens + token, lse, mask=mask_m)


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of each sequence's newest tokens to its pages; arguments as the op checked them.

    Args:
        q: [T, H, D]; float32, float16 or bfloat16; unit last stride.
        k_pages: [P, K, N, D], any strides with a unit last one.
        v_pages: Like k_pages.
        page_table: [B, max_pages] integers; ids out of range are skipped, never followed.
        lengths: [B] integers, keys of each sequence with this chunk; read on the device.
        cu_seqlens_q: [B + 1] first token of each chunk, then T; None: one token a sequence.
        max_seqlen_q: Longest chunk; rows past it are not computed.
        causal: Query i of n sees keys up to length - n + i.
        window: Keys (left, right) of that key to keep, -1 for all.
        scale: Factor of the scores; None is 1 / sqrt(D).
        return_lse: Whether to compute the log-sum-exp.

    Returns:
        out like q, contiguous, and lse float32 [H, T] (natural log) or None.
    """
    (tokens, heads, dim), (pages, kv_heads, page_size, _) = q.shape, k_pages.shape
    batch, max_pages = page_table.shape
    max_keys = max_pages * page_size
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, device=q.device) if return_lse else None
    if out.numel() == 0 or batch * max_keys * max_seqlen_q == 0:
        return out.zero_(), lse.fill_(-math.inf) if lse is not None else None

    left, right = window or (-1, -1)
    if causal:
        right = 0
    left = -1 if left >= max_keys - 1 else left  # reaches the first key from the last query
    right = -1 if right >= max_seqlen_q - 1 and not causal else right
    group = heads // kv_heads
    rows = max_seqlen_q * group
    config = pick_config(compute_capability(), dim, q.element_size(), rows, max_keys)
    splits = triton.cdiv(max_keys, config.SPLIT_KEYS) if config.SPLIT_KEYS else 1
    tiles = triton.cdiv(rows, config.BLOCK_M)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, heads, tokens, dtype=torch.float32, device=q.device)
    ieee = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    # fmt: off
    _paged_attention_kernel[(batch * kv_heads * splits * tiles,)](
        q, k_pages, v_pages, page_table, lengths, cu_seqlens_q, part, part_lse,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], *page_table.stride(),
        tokens, kv_heads, pages, max_pages, tiles, splits,
        (dim**-0.5 if scale is None else scale) * LOG2E.value, left, right,
        GROUP=group, HEAD_DIM=dim, PAGE_SIZE=page_size,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, PRECISION="ieee" if ieee else "tf32",
        **asdict(config),
    )
    # fmt: on
    if splits > 1:
        merge_splits(
            part,
            part_lse,
            out,
            lse,
            lengths=lengths,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            split_keys=config.SPLIT_KEYS,
        )
    return out, lse
