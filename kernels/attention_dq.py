"""Gradient of attention with regard to its queries (FlashAttention-2, arXiv:2307.08691).

Maths: dQ = scale · dS K with dS = p ∘ (z ∘ dO Vᵀ - δ), in the terms of `attention_backward`, which
launches this kernel; and δ = rowsum(dO ∘ O).

Memory: q, dO, O and the row statistics cross HBM once, k and v once for each tile of BLOCK_M
queries, mostly from L2; written are dQ, and δ for the kernel of keys and values: dO is here
already, so δ needs no pass of its own.

Grid: one axis of batch · heads · query tiles, tiles fastest, then the heads of one KV group; where
rows grow with the query (causal), longest tiles first.

Dims: B batch, L/S query/key length, H query heads, K KV heads, D head_dim padded to BLOCK_D.
"""

import triton
import triton.language as tl

from bertgpt.kernels.dropout import keep_weights
from bertgpt.kernels.primitives import key_tiles, score_gradients, sequence_spans


@triton.jit
def _products(rows, tile, PRECISION: tl.constexpr):
    """Products rows tileᵀ; scalar ones would keep a left operand that stays whole in registers."""
    if rows.dtype == tl.float32 and PRECISION == "ieee":
        products = tl.trans(tl.dot(tile, tl.trans(rows), input_precision=PRECISION))
    else:
        products = tl.dot(rows, tl.trans(tile), input_precision=PRECISION)
    return products


# fmt: off
@triton.jit(do_not_specialize=["len_q", "len_k", "num_tiles", "window_left", "window_right",
                               "threshold"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    do_ptr, out_ptr, stats_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qm, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gm, stride_gh,  # of dO
    stride_ob, stride_om, stride_oh,  # of out and dQ
    stride_lb, stride_lh,  # of a row in stats and delta
    len_q, len_k,  # L and S, or all packed tokens
    num_heads, heads_per_kv, num_tiles,
    scale, score_scale,  # the latter times log2 e unless NATURAL
    window_left, window_right, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    NATURAL: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    # 1. This program's head and query tile; with a right bound, longest tiles first.
    pid_m = tl.program_id(0) % num_tiles
    pid_bh = tl.program_id(0) // num_tiles
    if HAS_RIGHT:
        pid_m = num_tiles - 1 - pid_m
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)
    h_kv = h // heads_per_kv
    start_q, len_q, start_k, len_k, used = sequence_spans(
        cu_q_ptr, cu_k_ptr, key_lengths_ptr, b, len_q, len_k
    )
    row_first = pid_m * BLOCK_M
    if row_first >= len_q:
        return

    # 2. Keys [lo, hi) are seen by some row of the tile, whole tiles of them by every row.
    diagonal = len_k - len_q
    row_last = tl.minimum(row_first + BLOCK_M, len_q) - 1
    lo, hi, tile_first, tile_last, full_first, full_count = key_tiles(
        row_first, row_last, diagonal, used, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    SPLIT_LOOP: tl.constexpr = mask_ptr is None and not NATURAL
    if not SPLIT_LOOP:
        full_count = 0

    # 3. Pointers, every offset 64-bit; this tile's rows, and δ, which the other kernel reads.
    offs_m = row_first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < len_q
    mask_d = (offs_d < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        mask_d = tl.full([1, BLOCK_D], True, tl.int1)  # a constant, which folds away
    mask_q = mask_m[:, None] & mask_d
    rows_m = offs_m[:, None].to(tl.int64)
    rows_n = offs_n[:, None].to(tl.int64)
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base += b * stride_mb + h * stride_mh
    q_base = q_ptr + b * stride_qb + start_q * stride_qm + h * stride_qh
    do_base = do_ptr + b * stride_gb + start_q * stride_gm + h * stride_gh
    k_base = k_ptr + b * stride_kb + start_k * stride_kn + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + start_k * stride_vn + h_kv * stride_vh
    k_ptrs = k_base + rows_n * stride_kn + offs_d[None, :]
    v_ptrs = v_base + rows_n * stride_vn + offs_d[None, :]
    out_base = b * stride_ob + start_q * stride_om + h * stride_oh
    out_offsets = out_base + rows_m * stride_om + offs_d[None, :]
    q = tl.load(q_base + rows_m * stride_qm + offs_d[None, :], mask=mask_q, other=0.0)
    do = tl.load(do_base + rows_m * stride_gm + offs_d[None, :], mask=mask_q, other=0.0)
    out = tl.load(out_ptr + out_offsets, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    rows = b * stride_lb + h * stride_lh + start_q + offs_m  # [BLOCK_M]
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=mask_m)
    row_max = tl.load(stats_ptr + 2 * rows, mask=mask_m, other=0.0)
    row_log_sum = tl.load(stats_ptr + 2 * rows + 1, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # 4. Tiles that every row sees whole (they alone are pipelined), then the edges, or all tiles.
    for EDGE in tl.static_range(0 if SPLIT_LOOP else 1, 2):
        begin = tile_first if EDGE else full_first
        end = tile_last - full_count if EDGE else full_first + full_count
        for step in tl.range(begin, end, num_stages=1 if EDGE and SPLIT_LOOP else None):
            tile = tl.where(step >= full_first, step + full_count, step) if EDGE else step
            n = tl.full([], tile * BLOCK_N, tl.int64)
            keys = tile * BLOCK_N + offs_n
            seen = (keys >= lo) & (keys < hi)  # [BLOCK_N]
            mask_k = seen[:, None] & mask_d if EDGE else mask_d
            k = tl.load(k_ptrs + n * stride_kn, mask=mask_k, other=0.0)  # [BLOCK_N, BLOCK_D]
            v = tl.load(v_ptrs + n * stride_vn, mask=mask_k, other=0.0)
            scores = _products(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
            grad_weights = _products(do, v, PRECISION)
            keep = None
            if seed_ptr is not None:
                keep = keep_weights(seed_ptr, pid_bh, offs_m, n, threshold, BLOCK_M, BLOCK_N)
            _, grad_scores, visible = score_gradients(
                scores, grad_weights, offs_m[:, None], keys[None, :], mask_m[:, None],
                seen[None, :], row_max[:, None], row_log_sum[:, None], delta[:, None], keep,
                mask_base, stride_mm, stride_mn, diagonal, window_left, window_right,
                score_scale, keep_scale,
                HAS_LEFT, HAS_RIGHT, IS_ADDITIVE, NATURAL, MASK_PER_QUERY, EDGE,
            )  # fmt: skip
            if EDGE and mask_ptr is not None:  # what no row of the tile sees may be NaN
                k = tl.where((tl.max(visible.to(tl.int32), 0) > 0)[:, None], k, 0.0)
            dq = tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=PRECISION)

    # 5. A row without a key has seen no tile, or nothing in one: zeros.
    tl.store(dq_ptr + out_offsets, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q)
