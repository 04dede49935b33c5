"""Gradient of attention with regard to an additive mask.

Maths: dmask = dS = p ∘ (z ∘ dO Vᵀ - δ), in the terms of `attention_backward`, which calls this
launcher, summed over every dimension of [B, H, L, S] that the mask was broadcast in.

Memory: q, dO and the row statistics cross HBM once for each tile of keys, k and v once for each
tile of queries, mostly from L2; written is dmask, once, in the mask's own shape, and nothing else.

Grid: one axis of the mask's batch · heads · query tiles · key tiles, key tiles fastest. A program
walks all the batches, heads and queries that share its part of the mask and adds in one order, so
results are deterministic; a mask of few values has few programs.

Dims: B batch, L/S query/key length, H query heads, K KV heads, D head_dim padded to BLOCK_D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bertgpt.kernels.attention_call import AttentionCall, Config
from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.dropout import keep_weights
from bertgpt.kernels.primitives import query_tiles, score_gradients, sequence_spans

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by the largest BLOCK_D: the largest tiles that compile
# without a spill.
_HOPPER = {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 4, 2)}
_BLACKWELL = {**_HOPPER, 256: (32, 32, 8, 2)}
_OTHERS = {**_HOPPER, 128: (32, 64, 8, 2)}
_UNALIGNED = {256: (16, 16, 8, 1)}
_UNALIGNED_CHUNK = 32
_FLOAT32 = {64: (16, 32, 8, 1), 256: (16, 16, 4, 1)}


def pick_config(capability: int, head_dim: int, dtype_bytes: int, aligned: bool) -> Config:
    """Tile shape for a compute capability (90 = sm_90) and a call.

    `aligned` says that rows are multiples of 16 bytes. Lengths and batch play no part.
    """
    if not aligned:
        table = _UNALIGNED  # loads of single elements, one pointer each: D in chunks
    elif dtype_bytes == 4:
        table = _FLOAT32  # products without tensor cores
    else:
        table = {9: _HOPPER, 10: _BLACKWELL}.get(capability // 10, _OTHERS)
    return Config(*table[min(d for d in table if head_dim <= d)])


# fmt: off
@triton.jit(do_not_specialize=["len_q", "len_k", "window_left", "window_right", "threshold",
                               "batches", "heads", "programs_m", "programs_n"])
def _attention_bwd_dmask_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_lengths_ptr, seed_ptr, do_ptr, stats_ptr, delta_ptr,
    dmask_ptr,
    stride_qb, stride_qm, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gm, stride_gh,  # of dO
    stride_lb, stride_lh,  # of a row in stats and delta
    len_q, len_k, num_heads, heads_per_kv,
    batches, heads,  # that share one entry of the mask
    programs_m, programs_n,  # of one entry
    scale, window_left, window_right, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    SUM_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):
    # fmt: on
    # 1. This program's entry of the mask and its tile there.
    pid_n = tl.program_id(0) % programs_n
    pid_m = tl.program_id(0) // programs_n % programs_m
    entry = tl.program_id(0) // (programs_n * programs_m)
    b_first = entry // (num_heads // heads)
    h_first = entry % (num_heads // heads)
    diagonal = len_k - len_q
    key_first = pid_n * BLOCK_N
    keys = key_first + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    # 2. The query tiles that see some key of the tile: this one, or all where one mask row serves
    # every query.
    key_last = tl.minimum(key_first + BLOCK_N, len_k) - 1
    tiles = query_tiles(
        key_first, key_last, diagonal, len_q, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    tile_m_first, tile_m_last = tiles[2], tiles[3]
    if not SUM_QUERIES:
        tile_m_first = tl.maximum(tile_m_first, pid_m)
        tile_m_last = tl.minimum(tile_m_last, pid_m + 1)
    tiles_m = tl.maximum(tile_m_last - tile_m_first, 0)

    # 3. They in turn, in each head and batch that shares the entry; every offset is 64-bit.
    # Nothing as wide as D is added up, so D may come in chunks.
    for step in tl.range(batches * heads * tiles_m):
        b = (b_first + step // (heads * tiles_m)).to(tl.int64)
        h = (h_first + step // tiles_m % heads).to(tl.int64)
        queries = (tile_m_first + step % tiles_m) * BLOCK_M + offs_m  # [BLOCK_M]
        h_kv = h // heads_per_kv
        used = sequence_spans(None, None, key_lengths_ptr, b, len_q, len_k)[4]
        exists = queries < len_q
        seen = keys < used
        rows_m = queries[:, None].to(tl.int64)
        rows_n = keys[:, None].to(tl.int64)
        q_base = q_ptr + b * stride_qb + h * stride_qh
        do_base = do_ptr + b * stride_gb + h * stride_gh
        k_base = k_ptr + b * stride_kb + h_kv * stride_kh
        v_base = v_ptr + b * stride_vb + h_kv * stride_vh
        rows = b * stride_lb + h * stride_lh + queries
        row_max = tl.load(stats_ptr + 2 * rows, mask=exists, other=0.0)
        row_log_sum = tl.load(stats_ptr + 2 * rows + 1, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        grad_weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.range(0, BLOCK_D, CHUNK_D):
            offs_d = d + tl.arange(0, CHUNK_D)
            mask_d = (offs_d < HEAD_DIM)[None, :]
            mask_q = exists[:, None] & mask_d
            mask_k = seen[:, None] & mask_d
            q = tl.load(q_base + rows_m * stride_qm + offs_d[None, :], mask=mask_q, other=0.0)
            do = tl.load(do_base + rows_m * stride_gm + offs_d[None, :], mask=mask_q, other=0.0)
            k = tl.load(k_base + rows_n * stride_kn + offs_d[None, :], mask=mask_k, other=0.0)
            v = tl.load(v_base + rows_n * stride_vn + offs_d[None, :], mask=mask_k, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            grad_weights = tl.dot(do, tl.trans(v), grad_weights, input_precision=PRECISION)
        keep = None
        if seed_ptr is not None:
            batch_head = b * num_heads + h
            keep = keep_weights(
                seed_ptr, batch_head, queries, key_first, threshold, BLOCK_M, BLOCK_N
            )
        acc += score_gradients(
            scores, grad_weights, queries[:, None], keys[None, :], exists[:, None],
            seen[None, :], row_max[:, None], row_log_sum[:, None], delta[:, None], keep,
            mask_ptr + b * stride_mb + h * stride_mh, stride_mm, stride_mn,
            diagonal, window_left, window_right, scale, keep_scale,
            HAS_LEFT, HAS_RIGHT, True, True, MASK_PER_QUERY, True,
        )[1]  # fmt: skip

    # 4. The tile, or its sum over queries; those outside L have added zeros.
    rows = pid_m * BLOCK_M + offs_m
    mask_rows = len_q
    if SUM_QUERIES:
        acc, rows, mask_rows = tl.sum(acc, 0, keep_dims=True), tl.arange(0, 1), 1
    offsets = (entry.to(tl.int64) * mask_rows + rows[:, None]) * len_k + keys[None, :]
    stored = (rows < mask_rows)[:, None] & (keys < len_k)[None, :]
    tl.store(dmask_ptr + offsets, acc.to(dmask_ptr.dtype.element_ty), mask=stored)


# fmt: off
def attention_dmask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
    grad_out: torch.Tensor, stats: torch.Tensor, delta: torch.Tensor,
    mask_shape: Sequence[int], scale: float, call: AttentionCall, aligned: bool,
) -> torch.Tensor:
    """Gradient of a mask that was broadcast from `mask_shape`, [B or 1, H or 1, L or 1, S or 1].

    mask is the additive one as the other kernels read it, [B, H, L, S] of any strides; stats and
    delta are what the forward pass and dQ's kernel wrote; `aligned` as in `pick_config`.

    Returns:
        Contiguous, of `mask_shape`, in the mask's dtype.
    """
    # fmt: on
    (batch, len_q, num_heads, _), len_k = q.shape, k.shape[1]
    mask_batch, mask_heads, mask_rows, mask_keys = mask_shape
    sum_queries = mask_rows == 1
    config = pick_config(compute_capability(), q.shape[-1], q.element_size(), aligned)
    programs_m = 1 if sum_queries else triton.cdiv(len_q, config.BLOCK_M)
    programs_n = triton.cdiv(len_k, config.BLOCK_N)
    dmask = torch.empty(tuple(mask_shape), dtype=mask.dtype, device=q.device)
    if mask_keys == 1:
        return dmask.zero_()  # a shift of all of a query's scores, which softmax does not see
    key_lengths, _, _ = call.indices
    seed, *drop = call.dropout
    constants = {
        name: call.constants[name]
        for name in ("HEAD_DIM", "BLOCK_D", "HAS_LEFT", "HAS_RIGHT", "MASK_PER_QUERY", "PRECISION")
    }
    _attention_bwd_dmask_kernel[(mask_batch * mask_heads * programs_m * programs_n,)](
        q, k, v, mask, key_lengths, seed, grad_out, stats, delta, dmask,
        *call.strides(q), *call.strides(k), *call.strides(v), *mask.stride(),
        *call.strides(grad_out), *call.row_strides(q),
        len_q, len_k, num_heads, num_heads // k.shape[-2],
        batch // mask_batch, num_heads // mask_heads, programs_m, programs_n,
        scale, *call.window, *drop,
        **constants, SUM_QUERIES=sum_queries,
        CHUNK_D=constants["BLOCK_D"] if aligned else min(constants["BLOCK_D"], _UNALIGNED_CHUNK),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dmask
