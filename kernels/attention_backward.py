"""Fused masked attention, backward (FlashAttention-2, arXiv:2307.08691, algorithm 2).

Maths: with p = softmax(s) from the forward pass's row statistics, δ = rowsum(dO ∘ O), and dropout's
factors z (1 / (1 - p_drop) where a weight is kept, 0 elsewhere; 1 without dropout),
    dV = (z ∘ p)ᵀ dO;  dS = p ∘ (z ∘ dO Vᵀ - δ);  dQ = scale · dS K;  dK = scale · dSᵀ Q.
Scores and dropout bits are computed again, dS in both kernels: five products would do, but only by
atomics on dQ; with seven, one program owns each row and adds in one order.

Memory: after `attention_dq`, which writes δ, k and v cross HBM once, q, dO and their rows'
statistics once for each tile of BLOCK_N keys, mostly from L2; written are dK and dV alone.

Grid: one axis of batch · KV heads · key tiles, tiles fastest, so that neighbours read the same
queries; under causal the longest tiles come first by themselves.

Dims: B batch, L/S query/key length, H query heads, K KV heads, D head_dim padded to BLOCK_D.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from bertgpt.kernels.attention_call import attention_call
from bertgpt.kernels.attention_dmask import attention_dmask
from bertgpt.kernels.attention_dq import _attention_bwd_dq_kernel
from bertgpt.kernels.attention_tiles import pick_config
from bertgpt.kernels.descriptors import describable
from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.dropout import keep_weights
from bertgpt.kernels.primitives import (
    LOG2E,
    query_tiles,
    score_gradients,
    sequence_spans,
)


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
    used_q = tl.where(key_first < used, len_q, 0)
    lo, hi, tile_first, tile_last, full_first, full_count = query_tiles(
        key_first, key_last, diagonal, used_q, window_left, window_right,
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
                exists = tl.full([BLOCK_M], True, tl.int1)
                if EDGE:
                    exists = (queries >= lo) & (queries < hi)
                row_max = tl.load(stats_ptr + 2 * rows, mask=exists, other=0.0)
                row_log_sum = tl.load(stats_ptr + 2 * rows + 1, mask=exists, other=float("-inf"))
                live = row_log_sum != float("-inf")  # a row that sees no key at all may hold NaN
                mask_q = live[:, None] & mask_d if EDGE else mask_d
                delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
                q = tl.load(q_ptrs + m * stride_qm, mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_D]
                do = tl.load(do_ptrs + m * stride_gm, mask=mask_q, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                keep = None
                if seed_ptr is not None:
                    batch_head = b * num_heads + h
                    keep = tl.trans(keep_weights(
                        seed_ptr, batch_head, queries, key_first, threshold, BLOCK_M, BLOCK_N
                    ))  # fmt: skip
                weights, grad_scores, _ = score_gradients(
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


# fmt: off
def attention_bwd(
    grad_out: torch.Tensor, out: torch.Tensor, stats: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
    scale: float, mask_shape: Sequence[int] | None = None, **arguments: Any,
) -> Mapping[str, torch.Tensor]:
    """Gradients of attention's output with regard to q, k and v, and an additive mask's.

    grad_out is like out, of any strides; out and stats are what `attention_fwd` returned for the
    call that q, k, v, scale and `attention_call`'s arguments repeat. `mask_shape` asks for the
    mask's gradient too: the shape, of four dimensions, from which the mask was broadcast.

    Returns:
        Contiguous gradients by name: "q", "k", "v", each like its input, and "mask" of
        `mask_shape` if given; zero where nothing is seen, and in packed tokens of no sequence.
    """
    # fmt: on
    mask, dim = arguments["mask"], q.shape[-1]
    call = attention_call(q, k, **arguments)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    aligned = all(describable(x) for x in (q, k, v, grad_out))
    empty = 0 in (q.numel(), k.numel(), call.longest_q, call.longest_k)
    if call.extras == 2 and not aligned and not empty:
        grad_out, out, q, k, v = (_aligned_rows(x) for x in (grad_out, out, q, k, v))
        call, aligned = attention_call(q, k, **arguments), True
    allocate = torch.zeros if call.packed else torch.empty  # packed: wrong spans leave gaps
    dq, dk, dv = (allocate(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    gradients = {"q": dq, "k": dk, "v": dv}
    if empty:
        if mask_shape is not None:
            gradients["mask"] = mask.new_empty(tuple(mask_shape))
        return {name: gradient.zero_() for name, gradient in gradients.items()}

    delta = torch.empty(call.row_shape(q), dtype=torch.float32, device=q.device)
    heads, kv_heads = q.shape[-2], k.shape[-2]
    seed, *drop = call.dropout
    inputs = (q, k, v, mask, *call.indices, seed, grad_out)
    strides = [*call.strides(q), *call.strides(k), *call.strides(v)]
    strides += mask.stride() if mask is not None else (0, 0, 0, 0)
    strides += call.strides(grad_out)
    scales = scale, scale if call.natural else scale * LOG2E.value
    # δ is written by the first launch and read by the others.
    for gradient, kernel, tensors, like in (
        ("dq", _attention_bwd_dq_kernel, (out, stats, delta, dq), dq),
        ("dkdv", _attention_bwd_dkdv_kernel, (stats, delta, dk, dv), dk),
    ):
        config = pick_config(
            gradient, compute_capability(), q.shape[-1], q.element_size(), call.extras, aligned
        )
        tile = config.BLOCK_M if gradient == "dq" else config.BLOCK_N
        tiles = triton.cdiv(call.longest_q if gradient == "dq" else call.longest_k, tile)
        kernel[(call.batch * like.shape[-2] * tiles,)](
            *inputs, *tensors, *strides, *call.strides(like), *call.row_strides(q),
            q.shape[-3], k.shape[-3], heads, heads // kv_heads, tiles, *scales, *call.window, *drop,
            **call.constants, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if mask_shape is not None:
        gradients["mask"] = attention_dmask(
            q, k, v, mask, grad_out, stats, delta, mask_shape, scale, call, aligned
        )
    return {
        name: gradient if name == "mask" else gradient[..., :dim].contiguous()
        for name, gradient in gradients.items()
    }


def _aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """A copy of x [..., D] with zeros at each row's end, so that rows begin at 16 bytes.

    Single elements, one pointer each, leave no registers for the most that a call adds.
    """
    dim = x.shape[-1]
    padded = x.new_zeros(*x.shape[:-1], dim + -dim % (16 // x.element_size()))
    padded[..., :dim] = x
    return padded
