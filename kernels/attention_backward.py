"""Fused masked attention, backward (FlashAttention-2, arXiv:2307.08691, algorithm 2).

Maths: with p = softmax(s) from the forward pass's statistics, δ = rowsum(dO ∘ O) and, under
dropout, z = keep / (1 - p_drop), else 1:
    dV = (z ∘ p)ᵀ dO;  dS = p ∘ (z ∘ dO Vᵀ - δ);  dQ = scale · dS K;  dK = scale · dSᵀ Q.
Scores and dropout bits are computed again. Masked pairs are selected away, not multiplied by 0.

Memory: the first kernel reads q, dO and O once, K and V once a query tile, and writes dQ and δ (one
float a row; its dO is there already, so no pass of its own). The second reads K and V once, q and
dO once a key tile, and writes dK and dV. No [L, S] matrix is stored.

Grid: one axis of batch · query heads · query tiles for dQ, where a program loops over key tiles;
batch · KV heads · key tiles for dK and dV, looping over the query tiles of each head of its group.
One program owns each row and adds in a fixed order: no atomics, the same bits at every run.

Dims: B batch, L/S query/key length, H query heads, K KV heads, D head_dim padded to BLOCK_D.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bertgpt.kernels.attention_call import attention_call
from bertgpt.kernels.descriptors import describable
from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.primitives import (
    LOG2E,
    keep_tile,
    key_tiles,
    mask_scores,
    query_tiles,
    sequence_spans,
)


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one specialisation of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (BLOCK_M, BLOCK_N, num_warps, num_stages), plain and with a mask tensor or dropout, by the largest
# BLOCK_D.
# fmt: off
_DQ = {64: ((64, 64, 4, 2), (64, 32, 4, 2)), 128: ((64, 64, 8, 2), (64, 32, 8, 2)),
       256: ((64, 32, 8, 1), (64, 32, 8, 1))}
_DKDV = {64: ((64, 64, 4, 2), (32, 64, 4, 2)), 128: ((32, 64, 8, 2), (32, 64, 8, 2)),
         256: ((32, 64, 8, 1), (32, 64, 8, 1))}
_UNALIGNED = {32: ((16, 16, 4, 1),) * 2, 64: ((16, 16, 4, 1),) * 2, 128: ((16, 16, 8, 1),) * 2,
              256: ((16, 16, 8, 1),) * 2}
_FLOAT32 = {64: ((32, 32, 8, 1),) * 2, 128: ((16, 16, 8, 1),) * 2, 256: ((16, 16, 8, 1),) * 2}
# fmt: on


def pick_config(
    gradient: str, capability: int, head_dim: int, dtype_bytes: int, extra: bool, aligned: bool
) -> Config:
    """Tile shape of one kernel ("dq" or "dkdv") for a compute capability (90 = sm_90) and a call.

    `aligned` says that rows are multiples of 16 bytes, `extra` that a mask is given or weights are
    dropped. Lengths and batch play no part: a sequence's bits don't depend on the batch it is in.
    """
    if not aligned:
        table = _UNALIGNED  # loads of single elements, one pointer each
    elif dtype_bytes == 4:
        table = _FLOAT32  # products without tensor cores
    else:
        table = _DQ if gradient == "dq" else _DKDV
    return Config(*table[min(d for d in table if head_dim <= d)][extra])


def unsupported(**call: Any) -> str | None:
    """Nothing that the forward kernel takes."""
    return None


# fmt: off
@triton.jit
def _tile_gradients(
    scores, grad_weights, queries, keys, query_inside, key_inside, row_max, row_log_sum, delta,
    keep, mask_base, stride_mm, stride_mn, diagonal, window_left, window_right, scale, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_ADDITIVE: tl.constexpr,
    NATURAL: tl.constexpr, MASK_PER_QUERY: tl.constexpr, MASKED: tl.constexpr,
):
    """Z ∘ p / (1 - p_drop)⁻¹, dS and the pairs that may meet, of a tile or its transpose.

    scores are q kᵀ, grad_weights dO vᵀ. Without MASKED every pair may meet.
    """
    # fmt: on
    visible = True
    if NATURAL:
        scores *= scale
    if MASKED:
        scores, visible, _ = mask_scores(
            scores, queries, keys, query_inside, key_inside, diagonal, window_left, window_right,
            mask_base, stride_mm, stride_mn, HAS_LEFT, HAS_RIGHT, IS_ADDITIVE, MASK_PER_QUERY,
        )  # fmt: skip
    if NATURAL:  # the difference of two large biases is exact, if it comes first
        p = tl.exp2((scores - row_max) * LOG2E - row_log_sum)
    else:
        p = tl.exp2(scores * scale - (row_max + row_log_sum))
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dropped = p
    if keep is not None:
        dropped = tl.where(keep, p, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    grad_scores = p * (grad_weights - delta)
    if MASKED:
        grad_scores = tl.where(visible, grad_scores, 0.0)
    return dropped, grad_scores, visible


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
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            keep = None
            if seed_ptr is not None:
                keep = keep_tile(seed_ptr, pid_bh, offs_m, n, threshold, BLOCK_M, BLOCK_N)
            _, grad_scores, visible = _tile_gradients(
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


# fmt: off
@triton.jit(do_not_specialize=["len_q", "len_k", "num_tiles", "window_left", "window_right",
                               "threshold"])
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_lengths_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    do_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qm, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gm, stride_gh,  # of dO
    stride_ob, stride_on, stride_oh,  # of dK and dV
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
    # 1. This program's KV head and key tile.
    kv_heads = num_heads // heads_per_kv
    pid_n = tl.program_id(0) % num_tiles
    pid_bh = tl.program_id(0) // num_tiles
    b = (pid_bh // kv_heads).to(tl.int64)
    h_kv = (pid_bh % kv_heads).to(tl.int64)
    start_q, len_q, start_k, len_k, used = sequence_spans(
        cu_q_ptr, cu_k_ptr, key_lengths_ptr, b, len_q, len_k
    )
    key_first = pid_n * BLOCK_N
    if key_first >= len_k:
        return

    # 2. Queries [lo, hi) see some key of the tile, whole tiles of them every key in use.
    diagonal = len_k - len_q
    key_last = tl.minimum(key_first + BLOCK_N, used) - 1
    queries = tl.where(key_first < used, len_q, 0)
    lo, hi, tile_first, tile_last, full_first, full_count = query_tiles(
        key_first, key_last, diagonal, queries, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    SPLIT_LOOP: tl.constexpr = mask_ptr is None and not NATURAL
    if not SPLIT_LOOP:
        full_count = 0

    # 3. This tile's keys and values; every offset is 64-bit.
    offs_m = tl.arange(0, BLOCK_M)
    keys = key_first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = keys < used
    mask_d = (offs_d < HEAD_DIM)[None, :]
    if HEAD_DIM == BLOCK_D:
        mask_d = tl.full([1, BLOCK_D], True, tl.int1)  # a constant, which folds away
    rows_m = offs_m[:, None].to(tl.int64)
    rows_n = keys[:, None].to(tl.int64)
    k_base = k_ptr + b * stride_kb + start_k * stride_kn + h_kv * stride_kh
    v_base = v_ptr + b * stride_vb + start_k * stride_vn + h_kv * stride_vh
    mask_k = mask_n[:, None] & mask_d
    k = tl.load(k_base + rows_n * stride_kn + offs_d[None, :], mask=mask_k, other=0.0)
    v = tl.load(v_base + rows_n * stride_vn + offs_d[None, :], mask=mask_k, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # 4. The query heads of this KV head in turn. Tiles are transposed, [BLOCK_N, BLOCK_M]: weights
    # and score gradients then come out of one product as the left operand of the next.
    for h in range(h_kv * heads_per_kv, (h_kv + 1) * heads_per_kv):
        mask_base = mask_ptr
        if mask_ptr is not None:
            mask_base += b * stride_mb + h * stride_mh
        q_base = q_ptr + b * stride_qb + start_q * stride_qm + h * stride_qh
        do_base = do_ptr + b * stride_gb + start_q * stride_gm + h * stride_gh
        q_ptrs = q_base + rows_m * stride_qm + offs_d[None, :]
        do_ptrs = do_base + rows_m * stride_gm + offs_d[None, :]
        row_base = b * stride_lb + h * stride_lh + start_q
        for EDGE in tl.static_range(0 if SPLIT_LOOP else 1, 2):
            begin = tile_first if EDGE else full_first
            end = tile_last - full_count if EDGE else full_first + full_count
            for step in tl.range(begin, end, num_stages=1 if EDGE and SPLIT_LOOP else None):
                tile = tl.where(step >= full_first, step + full_count, step) if EDGE else step
                m = tl.full([], tile * BLOCK_M, tl.int64)
                queries = tile * BLOCK_M + offs_m
                rows = row_base + queries  # [BLOCK_M]
                exists = (queries >= lo) & (queries < hi) if EDGE else None
                row_max = tl.load(stats_ptr + 2 * rows, mask=exists, other=float("-inf"))
                live = row_max != float("-inf")  # a row that sees no key at all may hold NaN
                mask_q = live[:, None] & mask_d if EDGE else mask_d
                row_log_sum = tl.load(stats_ptr + 2 * rows + 1, mask=exists, other=0.0)
                delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
                q = tl.load(q_ptrs + m * stride_qm, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]
                do = tl.load(do_ptrs + m * stride_gm, mask=mask_q, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                keep = None
                if seed_ptr is not None:
                    batch_head = b * num_heads + h
                    keep = tl.trans(keep_tile(
                        seed_ptr, batch_head, queries, key_first, threshold, BLOCK_M, BLOCK_N
                    ))  # fmt: skip
                weights, grad_scores, _ = _tile_gradients(
                    scores, grad_weights, queries[None, :], keys[:, None], live[None, :],
                    mask_n[:, None], row_max[None, :], row_log_sum[None, :], delta[None, :], keep,
                    mask_base, stride_mm, stride_mn, diagonal, window_left, window_right,
                    score_scale, keep_scale,
                    HAS_LEFT, HAS_RIGHT, IS_ADDITIVE, NATURAL, MASK_PER_QUERY, EDGE,
                )  # fmt: skip
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
                dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision=PRECISION)

    # 5. Every key of the sequence gets its rows; whole tiles have left those not in use unmasked.
    used_rows = mask_n[:, None]
    out_base = b * stride_ob + start_k * stride_on + h_kv * stride_oh
    offsets = out_base + rows_n * stride_on + offs_d[None, :]
    stored = (keys < len_k)[:, None] & mask_d
    dk = tl.where(used_rows, dk * scale, 0.0)
    dv = tl.where(used_rows, dv * keep_scale if seed_ptr is not None else dv, 0.0)
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=stored)


def attention_bwd(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    **arguments: Any,
) -> Mapping[str, torch.Tensor]:
    """Gradients of attention's output with regard to q, k and v.

    Args:
        grad_out: Like out, any strides.
        out: The forward pass's output, contiguous.
        stats: Its row statistics, as `attention_fwd` returns them.
        q: As in the forward pass, as are k, v, scale and `attention_call`'s arguments.
        k: See q.
        v: See q.
        scale: See q.
        **arguments: See q.

    Returns:
        Contiguous gradients by name: "q", "k", "v", each like its input; zero where nothing is
        seen, and in packed tokens of no sequence.
    """
    mask = arguments["mask"]
    call = attention_call(q, k, **arguments)
    allocate = torch.zeros if call.packed else torch.empty  # packed: wrong spans leave gaps
    dq, dk, dv = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or call.longest_q == 0 or call.longest_k == 0:
        return {"q": dq.zero_(), "k": dk.zero_(), "v": dv.zero_()}

    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    delta = torch.empty(call.row_shape(q), dtype=torch.float32, device=q.device)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    seed, *drop = call.dropout
    aligned = all(describable(x) for x in (q, k, v, grad_out))
    inputs = (q, k, v, mask, *call.indices, seed, grad_out)
    strides = [*call.strides(q), *call.strides(k), *call.strides(v)]
    strides += mask.stride() if mask is not None else (0, 0, 0, 0)
    strides += call.strides(grad_out)
    scales = scale, scale if call.natural else scale * LOG2E.value
    # δ is written by the first launch and read by the second.
    for gradient, kernel, tensors, like in (
        ("dq", _attention_bwd_dq_kernel, (out, stats, delta, dq), dq),
        ("dkdv", _attention_bwd_dkdv_kernel, (stats, delta, dk, dv), dk),
    ):
        config = pick_config(
            gradient, compute_capability(), q.shape[-1], q.element_size(),
            mask is not None or seed is not None, aligned,
        )  # fmt: skip
        tile = config.BLOCK_M if gradient == "dq" else config.BLOCK_N
        tiles = triton.cdiv(call.longest_q if gradient == "dq" else call.longest_k, tile)
        kernel[(call.batch * like.shape[-2] * tiles,)](
            *inputs, *tensors, *strides, *call.strides(like), *call.row_strides(q),
            q.shape[-3], k.shape[-3], heads, heads // kv_heads, tiles, *scales, *call.window, *drop,
            **call.constants, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return {"q": dq, "k": dk, "v": dv}
