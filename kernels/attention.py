"""Fused masked attention, forward (FlashAttention-2, arXiv:2307.08691, algorithm 1).

Maths: with s = scale · q kᵀ + bias over the keys a query may see, out = softmax(s) v and
lse = ln Σ exp(s), in one pass over key tiles with a running maximum m and sum l:
    m' = max(m, max s);  l' = l e^(m - m') + Σ e^(s - m');  acc' = acc e^(m - m') + e^(s - m') v.
Exponentials are powers of two, scale · log2 e folded into one multiply-add; natural units instead
in float32 (s - m is exact where it matters) and under an additive mask (all finite biases count).

Memory: q, out, lse and a mask cross HBM once; k and v once for each tile of BLOCK_M queries, mostly
from L2, as the tiles of one head run together. No [L, S] matrix is stored.

Grid: one axis of batch · heads · query tiles, tiles fastest, then the heads of one KV group, so
that neighbours read the same keys; where rows grow with the query (causal), longest tiles first.

Dims: B batch, L/S query/key length, H query heads, K KV heads, D head_dim padded to BLOCK_D.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bertgpt.kernels.attention_call import attention_call
from bertgpt.kernels.descriptors import describable, describe_heads
from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.dropout import drop_weights
from bertgpt.kernels.primitives import (
    LN2,
    LOG2E,
    key_tiles,
    mask_scores,
    sequence_spans,
    softmax_step,
)

_SMALLEST_SCALE = 2.0**-126  # keeps scale 0 from turning the -inf of a masked score into NaN


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one specialisation."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    descriptors: bool  # keys and values by tensor descriptor (TMA), else by pointer


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by the largest BLOCK_D, then by `AttentionCall.extras`;
# the last given serves the rest.
# On sm_90 three 64 × 128 blocks of at most 168 registers a thread hide each other's exponentials.
# fmt: off
_HOPPER = {64: ((64, 128, 4, 2), (64, 64, 4, 2)),
           128: ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
           256: ((128, 64, 8, 2), (64, 32, 8, 2))}
_BLACKWELL = {64: ((128, 128, 8, 2), (128, 64, 8, 2)), 128: ((128, 128, 8, 2), (64, 64, 8, 2)),
              256: ((64, 64, 8, 2), (128, 32, 8, 2))}
_POINTERS: Any = {64: ((64, 64, 4, 3), (64, 32, 4, 2)), 128: ((128, 32, 8, 2), (64, 32, 8, 2)),
             256: ((64, 32, 8, 2), (32, 32, 8, 2))}
_UNALIGNED = {32: ((16, 16, 4, 1),), 64: ((16, 32, 4, 1),),
              128: ((16, 32, 8, 1),), 256: ((16, 16, 8, 1),)}
_FLOAT32 = {64: ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 2)),
            128: ((32, 16, 8, 2), (16, 32, 8, 2)),
            256: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1))}
# fmt: on


def pick_config(
    capability: int, head_dim: int, dtype_bytes: int, extras: int, aligned: bool
) -> Config:
    """Tile shape for a compute capability (90 = sm_90) and a call.

    `aligned` says that a descriptor can describe keys and values; `extras`: `AttentionCall`.
    Lengths and batch play no part: a sequence's bits don't depend on the batch it is in.
    """
    table, descriptors = _POINTERS, False
    if not aligned:
        table = _UNALIGNED  # loads of single elements, one pointer each
    elif dtype_bytes == 4:
        table = _FLOAT32  # products without tensor cores
    elif capability // 10 in (9, 10):
        table, descriptors = (_HOPPER if capability // 10 == 9 else _BLACKWELL), True
    tiles: Any = table[min(d for d in table if head_dim <= d)]
    return Config(*(*tiles[min(extras, len(tiles) - 1)], descriptors))


def unsupported(*, mask: torch.Tensor | None, **call: Any) -> str | None:
    """Why this kernel can't take a call that the common checks let through, or None."""
    if mask is not None and mask.dtype == torch.float64:
        return "a float64 mask would lose its range: scores are added up in float32"
    return None


@triton.jit
def _load_tile(desc, ptrs, b, row, h, offset, mask):
    """Keys or values [BLOCK_N, BLOCK_D]: by descriptor, or by pointer where there is none."""
    if desc is not None:
        tile = desc.load([b, row.to(tl.int32), h.to(tl.int32), 0]).reshape(ptrs.shape)
    else:
        tile = tl.load(ptrs + offset, mask=mask, other=0.0)
    return tile


# fmt: off
@triton.jit(do_not_specialize=["len_q", "len_k", "num_tiles_m", "window_left", "window_right",
                            "threshold"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, out_ptr, lse_ptr,
    stats_ptr,  # of each row m and log2 l, for the backward pass
    k_desc, v_desc,  # [B, S, K, D] or [1, T', K, D]; None: by pointer
    stride_qb, stride_qm, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_om, stride_oh,
    stride_lb, stride_lh,
    len_q, len_k,  # L and S, or all packed tokens
    num_heads, heads_per_kv, num_tiles_m,
    scale,  # unless NATURAL, its magnitude times log2 e
    window_left, window_right,
    threshold, keep_scale,  # of dropout, where there is a seed
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    NATURAL: tl.constexpr,  # statistics in units of e, not of 2
    MASK_PER_QUERY: tl.constexpr,  # else one mask row serves every query
    NEGATE_Q: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    # 1. This program's head and query tile.
    pid_m = tl.program_id(0) % num_tiles_m
    pid_bh = tl.program_id(0) // num_tiles_m
    if HAS_RIGHT:
        pid_m = num_tiles_m - 1 - pid_m
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)
    h_kv = h // heads_per_kv
    start_q, len_q, start_k, len_k, used = sequence_spans(
        cu_q_ptr, cu_k_ptr, key_lengths_ptr, b, len_q, len_k
    )
    desc_b = pid_bh // num_heads if cu_q_ptr is None else 0
    row_first = pid_m * BLOCK_M
    if row_first >= len_q:
        return

    # 2. Keys [lo, hi) are seen by some row of the tile, whole tiles of them by every row.
    # Query i sits on key i + diagonal, whatever key_lengths says (bottom-right alignment).
    diagonal = len_k - len_q
    row_last = tl.minimum(row_first + BLOCK_M, len_q) - 1
    lo, hi, tile_first, tile_last, full_first, full_count = key_tiles(
        row_first, row_last, diagonal, used, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    SPLIT_LOOP: tl.constexpr = mask_ptr is None and not NATURAL
    if not SPLIT_LOOP:
        full_count = 0

    # 3. Pointers; every offset is 64-bit.
    offs_m = row_first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < len_q
    mask_d = (offs_d < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        mask_d = tl.full([1, BLOCK_D], True, tl.int1)  # a constant, which folds away
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base += b * stride_mb + h * stride_mh
    q_base = q_ptr + b * stride_qb + start_q * stride_qm + h * stride_qh
    k_base = k_ptr + b * stride_kb + start_k * stride_kn + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + start_k * stride_vn + h_kv * stride_vh
    q_ptrs = q_base + offs_m[:, None].to(tl.int64) * stride_qm + offs_d[None, :]
    k_ptrs = k_base + offs_n[:, None].to(tl.int64) * stride_kn + offs_d[None, :]
    v_ptrs = v_base + offs_n[:, None].to(tl.int64) * stride_vn + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & mask_d, other=0.0)  # [BLOCK_M, BLOCK_D]
    if NEGATE_Q:
        q = -q
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # 4. Tiles that every row sees whole: nothing to mask. Not in float32, whose scalar products
    # hide the masking and leave no registers for two loops.
    if SPLIT_LOOP:
        for tile in tl.range(full_first, full_first + full_count):
            n = tl.full([], tile * BLOCK_N, tl.int64)
            k = _load_tile(k_desc, k_ptrs, desc_b, start_k + n, h_kv, n * stride_kn, mask_d)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i, scale, False)
            p = drop_weights(p, seed_ptr, pid_bh, offs_m, n, threshold, BLOCK_M, BLOCK_N)
            v = _load_tile(v_desc, v_ptrs, desc_b, start_k + n, h_kv, n * stride_vn, mask_d)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    # 5. Edge tiles on either side of the whole ones, or all tiles. Scores are selected, not
    # multiplied, and values that no row of the tile sees are zeroed: both may be NaN.
    EDGE_STAGES: tl.constexpr = 1 if SPLIT_LOOP else None  # a tile or two: no pipeline
    for step in tl.range(tile_first, tile_last - full_count, num_stages=EDGE_STAGES):
        tile = step
        if SPLIT_LOOP:
            tile = tl.where(step >= full_first, step + full_count, step)
        n = tl.full([], tile * BLOCK_N, tl.int64)
        keys = tile * BLOCK_N + offs_n
        seen = (keys >= lo) & (keys < hi)  # [BLOCK_N]
        rows = seen[:, None] & mask_d
        k = _load_tile(k_desc, k_ptrs, desc_b, start_k + n, h_kv, n * stride_kn, rows)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if NATURAL:
            scores *= scale
        scores, visible, allowed = mask_scores(  # [BLOCK_M, BLOCK_N]
            scores, offs_m[:, None], keys[None, :], mask_m[:, None], seen[None, :],
            diagonal, window_left, window_right, mask_base, stride_mm, stride_mn,
            HAS_LEFT, HAS_RIGHT, IS_ADDITIVE, MASK_PER_QUERY,
        )  # fmt: skip
        if MASK_PER_QUERY:
            seen = tl.max(visible.to(tl.int32), 0) > 0
        elif mask_ptr is not None:
            seen &= tl.reshape(allowed, [BLOCK_N])
        scores = tl.where(visible, scores, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i, scale, NATURAL)
        p = drop_weights(p, seed_ptr, pid_bh, offs_m, n, threshold, BLOCK_M, BLOCK_N)
        v = _load_tile(v_desc, v_ptrs, desc_b, start_k + n, h_kv, n * stride_vn, rows)
        if v_desc is not None or mask_ptr is not None:
            v = tl.where(seen[:, None], v, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    # 6. A row without a key has l = 0: zeros, and ln 0 = -inf.
    out = tl.where(l_i[:, None] == 0.0, 0.0, acc / l_i[:, None])
    if seed_ptr is not None:
        out *= keep_scale
    out_base = out_ptr + b * stride_ob + start_q * stride_om + h * stride_oh
    out_ptrs = out_base + offs_m[:, None].to(tl.int64) * stride_om + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)
    rows = b * stride_lb + h * stride_lh + start_q + offs_m
    if lse_ptr is not None:
        unit = 1.0 if NATURAL else LN2
        lse = tl.where(l_i == 0.0, float("-inf"), m_i * unit + tl.log(l_i))
        tl.store(lse_ptr + rows, lse, mask=mask_m)
    if stats_ptr is not None:  # apart, since beside a large bias their sum would lose ln l
        tl.store(stats_ptr + 2 * rows, m_i, mask=mask_m)
        tl.store(stats_ptr + 2 * rows + 1, tl.log2(l_i), mask=mask_m)


# fmt: off
def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    scale: float, return_lse: bool, return_stats: bool = False, **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Softmax attention in one pass; the arguments of `bertgpt.ops.attention`, checked by it.

    q [B, L, H, D], k and v [B, S, K, D], mask [B, H, L, S] of any strides; or q [T, H, D], k and v
    [T', K, D] with both cu_seqlens [B + 1] and max_seqlen_q, past which no query is computed. The
    last stride of q, k and v is 1. Masks, packing and dropout: `attention_call`.

    Returns:
        out like q, contiguous; lse float32 [B, H, L] or [H, T] (natural log) or None; and float32
        stats [B, H, L, 2] or [H, T, 2] that the backward pass wants, or None.
    """
    # fmt: on
    mask = arguments["mask"]
    call = attention_call(q, k, **arguments)
    heads, dim = q.shape[-2:]
    len_q, len_k = q.shape[-3], k.shape[-3]
    rows = call.row_shape(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, dtype=torch.float32, device=q.device) if return_lse else None
    stats = torch.empty((*rows, 2), dtype=torch.float32, device=q.device) if return_stats else None
    if out.numel() == 0 or len_k == 0 or call.longest_q == 0:
        for x in (lse, stats):
            _ = x if x is None else x.fill_(-math.inf)
        return out.zero_(), lse, stats

    folded = max(abs(scale) * LOG2E.value, _SMALLEST_SCALE)
    seed, *drop = call.dropout
    aligned = describable(k) and describable(v)
    config = pick_config(compute_capability(), dim, q.element_size(), call.extras, aligned)
    tiles, block_d = triton.cdiv(call.longest_q, config.BLOCK_M), call.constants["BLOCK_D"]
    described = [describe_heads(x, config.BLOCK_N, block_d) for x in (k, v) if config.descriptors]
    _attention_fwd_kernel[(call.batch * heads * tiles,)](
        q, k, v, mask, *call.indices, seed, out, lse, stats, *(described or (None, None)),
        *call.strides(q), *call.strides(k), *call.strides(v),
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
        *call.strides(out), *call.row_strides(q),
        len_q, len_k, heads, heads // k.shape[-2], tiles,
        scale if call.natural else folded, *call.window, *drop,
        **call.constants, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        NEGATE_Q=scale < 0 and not call.natural,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse, stats
