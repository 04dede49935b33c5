"""Gradients of `linear_cross_entropy`, the scores computed again, a slab at a time.

Maths: with p = exp(z − lse) and row gradients g, δ[t, v] = g[t] (p[t, v] − [v = label t]); then
    dx = δ w,  dw = δᵀ x,  db = Σ_t δ[t].
    g is divided by its largest magnitude before δ is rounded to the inputs' dtype, and multiplied
    back in float32: the mean of thousands of rows would push p below the smallest half number.
Memory: δ exists for `Slab.rows` rows and `Slab.columns` tokens at a time, written once and read
    twice, mostly through the L2; with it the slab's rows of x (gathered, labelled ones first) and
    their dx in float32: `slab_of` holds all of it under 64 MB at the usual widths. A kernel that
    kept δ on chip would need a whole row of dx, or of dw, beside it, BLOCK_M · E floats: more than
    an SM's registers at E = 768; split over E it would compute the scores again for every part.
Order: rows outside, tokens inside. dx gathers over tokens in float32 and is rounded once; dw
    gathers over slabs of rows in the weights' own dtype, so float32 weights lose nothing, and half
    ones are rounded once a slab, at most _HALF_SLABS times. No atomics: two runs agree bitwise.
Grid: one program per tile of δ, dw or dx, as in the forward pass. Programs past the last row that
    counts end at once.
Dims: T rows, V tokens, E inputs; any size, 0 included. Last strides are 1, row strides anything.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.gemm import grouped_tile, product_tile
from bertgpt.kernels.layout import as_rows
from bertgpt.kernels.linear_cross_entropy import (
    Config,
    column_of,
    config_for,
    labelled_first,
    pick_config,
    products_are_ieee,
    vocabulary_slabs,
)
from bertgpt.kernels.primitives import LOG2E

_BYTES = 54_000_000  # of a slab: δ, x and dx
_WEIGHT_BYTES = 8_000_000  # of its rows of w, which may have to be rounded to half
_MOST_ROWS = 4096
_TILE = 128
# Roundings of a half dw whose parts grow alike: 8 add 2.1 times one rounding's rms error.
_HALF_SLABS = 8


@dataclass(frozen=True)
class Slab:
    """How much of δ exists at a time: rows and tokens, multiples of a tile."""

    rows: int
    columns: int


def slab_of(rows: int, tokens: int, width: int, itemsize: int, half_weights: bool) -> Slab:
    """The slab of a [rows, tokens] δ over `width` inputs.

    x and dx take up to 3/8 of the bytes, δ the rest. From 8 · 4096 rows on, half weights ask for
    more rows a slab, and beyond about 64k rows of 768 then also for more bytes.
    """
    row_bytes = max(width * (itemsize + 4), 1)
    most = min(_MOST_ROWS, _BYTES * 3 // 8 // row_bytes)
    if half_weights:
        most = max(most, triton.cdiv(rows, _HALF_SLABS))
    slab_rows = _whole(min(most, rows))
    rest = max(_BYTES - slab_rows * row_bytes, _BYTES * 3 // 8)
    columns = min(rest // slab_rows, _WEIGHT_BYTES // max(width, 1)) // itemsize
    columns = columns // _TILE * _TILE
    return Slab(slab_rows, min(max(columns, _TILE), _whole(tokens)))


def _whole(size: int) -> int:
    return max(triton.cdiv(size, _TILE), 1) * _TILE


@triton.jit
def _score_gradient_kernel(
    x_ptr, w_ptr, b_ptr, label_ptr, lse_ptr, grad_ptr, count_ptr, delta_ptr, sums_ptr,
    first_row, first, T, V, E,
    stride_wv, stride_delta, stride_sums,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1. Which tile of δ. Tiles past the last row that counts stay as they are: nobody reads them.
    count = tl.minimum(tl.load(count_ptr) - first_row, T)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(V, BLOCK_N), GROUP_M)
    begin = pid_n.to(tl.int32) * BLOCK_N
    cols = begin + tl.arange(0, BLOCK_N)
    if pid_m * BLOCK_M >= count:
        if HAS_BIAS:
            zeros = tl.zeros([BLOCK_N], dtype=tl.float32)
            tl.store(sums_ptr + pid_m * stride_sums + cols, zeros, mask=cols < V)
        return
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = rows < count
    offs_k = tl.arange(0, BLOCK_K)

    # 2. The scores again.
    z = product_tile(
        x_ptr + tl.minimum(rows, T - 1)[:, None] * E + offs_k[None, :],
        w_ptr + tl.minimum(cols, V - 1).to(tl.int64)[None, :] * stride_wv + offs_k[:, None],
        None, E, 1, 1, not EVEN_K, not EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    # 3. δ = g (p − one-hot), rounded once, its column sums before that; half a tile at a time. Past
    #    V it is 0, so that whole tiles can be read.
    label = column_of(tl.load(label_ptr + rows, mask=counts, other=-1), first, V)
    lse = tl.load(lse_ptr + rows, mask=counts, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=counts, other=0.0)
    left, right = z.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        z = left if half == 0 else right  # [BLOCK_M, BLOCK_N / 2]
        cols = begin + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if HAS_BIAS:
            z += tl.load(b_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        p = tl.exp2((z - lse[:, None]) * LOG2E)
        delta = tl.where(cols[None, :] == label[:, None], p - 1.0, p) * grad[:, None]
        delta = tl.where(counts[:, None] & (cols < V)[None, :], delta, 0.0)
        if HAS_BIAS:
            tl.store(sums_ptr + pid_m * stride_sums + cols, tl.sum(delta, 0), mask=cols < V)
        delta_ptrs = delta_ptr + rows[:, None] * stride_delta + cols[None, :]
        tl.store(delta_ptrs, delta.to(delta_ptr.dtype.element_ty))


@triton.jit
def _add_product_kernel(
    a_ptr, b_ptr, out_ptr, scale_ptr, count_ptr,
    first_row, M, N, K,
    stride_am, stride_ak, stride_bk, stride_om,
    ROWS_ARE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1. Which tile of out [M, N]. Only rows of the batch that count take part, as M or as K.
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    count = tl.maximum(tl.load(count_ptr) - first_row, 0)
    if ROWS_ARE_K:
        K = tl.minimum(K, count)
    else:
        M = tl.minimum(M, count)
    if (pid_m * BLOCK_M >= M) | (K <= 0):
        return

    # 2. The product of a [M, K], which is δ or its transpose in whole tiles, and b [K, N]. δ's rows
    #    that do not count are not read along K; along M they end in rows that are not stored.
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = pid_n.to(tl.int32) * BLOCK_N
    cols = begin + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = product_tile(
        a_ptr + rows[:, None] * stride_am + offs_k[None, :] * stride_ak,
        b_ptr + offs_k[:, None] * stride_bk + cols[None, :],
        cols < N, K, stride_ak, stride_bk, ROWS_ARE_K, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    # 3. Added to what is there, in float32, and rounded to out's dtype; half a tile at a time.
    scale = tl.load(scale_ptr)
    left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        cols = begin + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_ptrs = out_ptr + rows[:, None] * stride_om + cols[None, :]  # [BLOCK_M, BLOCK_N / 2]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        out += (left if half == 0 else right) * scale
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def row_losses_backward(
    grad: Tensor,
    lse: Tensor,
    wanted: Collection[str],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int,
) -> dict[str, Tensor]:
    """By name, the gradients of Σ grad · loss by those of hidden, weight and bias that are wanted.

    grad and lse are float32, shaped like labels; lse is what `row_losses` gave.
    """
    x, w = as_rows(hidden), as_rows(weight)
    outputs = {
        "hidden": torch.empty(x.shape if "hidden" in wanted else 0, dtype=x.dtype, device=x.device),
        "weight": torch.zeros(w.shape if "weight" in wanted else 0, dtype=w.dtype, device=w.device),
        "bias": torch.zeros(len(w), device=w.device),
    }
    order, count = labelled_first(labels, ignore_index)
    labels, lse, grad = (values.flatten()[order] for values in (labels, lse, grad))
    grad = torch.where(labels == ignore_index, 0.0, grad)
    size = grad.abs()
    scale = torch.where(size.isfinite(), size, 0.0).max() if len(x) else grad.new_ones(())
    grad = grad / torch.where(scale == 0, 1.0, scale)

    slab = slab_of(len(x), len(w), w.shape[1], x.dtype.itemsize, w.dtype.itemsize == 2)
    delta = torch.empty(slab.rows, slab.columns, dtype=x.dtype, device=x.device)
    for first_row in range(0, len(x), slab.rows):
        span = slice(first_row, first_row + slab.rows)
        x_part = x[order[span]]
        dx_part = torch.zeros(x_part.shape, device=x.device)
        for first, w_part, b_part in vocabulary_slabs(w, bias, x.dtype, _TILE, slab.columns):
            part = slice(first, first + len(w_part))
            batch = (first_row, count)
            here = delta[: len(x_part), : len(w_part)]
            sums = _score_gradient(
                x_part, w_part, b_part, labels[span], lse[span], grad[span], here, first, *batch
            )
            if "hidden" in wanted:
                _add_product(here, w_part, dx_part, scale, *batch, rows_are_k=False)
            if "weight" in wanted:
                dw_part = outputs["weight"][part]
                _add_product(here.t(), x_part, dw_part, scale, *batch, rows_are_k=True)
            if "bias" in wanted:
                outputs["bias"][part] += sums.sum(0) * scale
        if "hidden" in wanted:
            outputs["hidden"].index_copy_(0, order[span], dx_part.to(x.dtype))
    outputs["hidden"] = outputs["hidden"].view(hidden.shape if "hidden" in wanted else 0)
    if bias is not None:
        outputs["bias"] = outputs["bias"].to(bias.dtype)
    return {name: outputs[name] for name in wanted}


def _score_gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    first: int,
    first_row: int,
    count: Tensor,
) -> Tensor:
    """Writes delta [rows, columns] of x [rows, E] and w [columns, E].

    Returns its sums over each row tile, float32 [tiles, columns]; written where there is a bias.
    """
    rows, (columns, width) = len(x), w.shape
    config = config_for(pick_config, x, w)
    row_tiles = triton.cdiv(rows, config.block_m)
    sums = torch.empty(row_tiles, columns, device=x.device)
    _score_gradient_kernel[(row_tiles * triton.cdiv(columns, config.block_n),)](
        x, w, w if b is None else b, labels, lse, grad, count, delta, sums,
        first_row, first, rows, columns, width,
        w.stride(0), delta.stride(0), sums.stride(0),
        HAS_BIAS=b is not None, EVEN_K=width % config.block_k == 0, **_options(config, x.dtype),
    )  # fmt: skip
    return sums


def _add_product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale: Tensor,
    first_row: int,
    count: Tensor,
    rows_are_k: bool,
) -> None:
    """Out [M, N] += scale · a [M, K] b [K, N], over the rows of the batch that count."""
    (m, k), n = a.shape, b.shape[1]
    config = config_for(pick_config, b, out, adds=True)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    _add_product_kernel[grid](
        a, b, out, scale, count,
        first_row, m, n, k,
        a.stride(0), a.stride(1), b.stride(0), out.stride(0),
        ROWS_ARE_K=rows_are_k, **_options(config, b.dtype),
    )  # fmt: skip


def _options(config: Config, dtype: torch.dtype) -> dict[str, object]:
    return {
        "PRECISION": "ieee" if products_are_ieee(dtype) else "tf32",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }
