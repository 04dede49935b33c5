"""Gradients of LayerNorm(dropout(x) + residual); nothing but its inputs is kept from forward.

Maths: with s, μ and ρ = 1/√(σ² + eps) found again as in add_layer_norm.py, x̂ = (s − μ) ρ, g = dy w:
    ds = ρ (g − mean(g) − x̂ mean(g x̂)) + dsum;  dx = dropout(ds);  dresidual = ds;
    dw = Σ_rows dy x̂;  db = Σ_rows dy.
Memory: x, r, dy (and dsum) are read once, ds (and dx under dropout) written once; the mask is drawn
    again, not stored. Each program adds up dw and db over its rows in registers and writes one
    float32 row of each, which are then summed: the same order in every run.
Grid: PROGRAMS programs, each taking every PROGRAMS-th block of ROWS rows.
Dims: R rows (leading dimensions flattened), E columns in CHUNKS pieces of CHUNK.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.add_layer_norm import Config, sum_and_moments
from bertgpt.kernels.device import compute_capability, multiprocessor_count
from bertgpt.kernels.dropout import dropout_arguments, keep_rows
from bertgpt.kernels.layout import as_rows


def pick_config(capability: int, width: int) -> Config:
    """The cut for `width` columns, 1 … MAX_GRADIENT_WIDTH; the same on every capability so far."""
    if width <= 2048:
        chunk = min(256, max(32, triton.next_power_of_2(width)))
        return Config(4 if width <= 128 else 1, chunk, triton.cdiv(width, chunk), num_warps=4)
    return Config(1, 1024, triton.cdiv(width, 1024), num_warps=16)


@triton.jit(do_not_specialize=["threshold"])
def _add_layer_norm_bwd_kernel(
    x_ptr, r_ptr, w_ptr, dy_ptr, dsum_ptr, seed_ptr, ds_ptr, dx_ptr, dw_ptr, db_ptr,
    R, E, eps, threshold, keep_scale,
    stride_x, stride_r, stride_dy, stride_dsum,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, CHUNK)[None, :]  # [1, CHUNK]
    dw = ()
    db = ()
    for _ in tl.static_range(CHUNKS):
        dw = dw + (tl.zeros([ROWS, CHUNK], tl.float32),)  # type: ignore  # noqa: RUF005
        db = db + (tl.zeros([ROWS, CHUNK], tl.float32),)  # type: ignore  # noqa: RUF005
    for block in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        rows = tl.full([], block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]

        # 1. The sum and its moments, as in the forward pass.
        pieces, mean, rstd = sum_and_moments(
            x_ptr, r_ptr, None, seed_ptr, rows, lanes, R, E, eps, threshold, keep_scale,
            stride_x, stride_r, HAS_RESIDUAL, ROWS, CHUNK, CHUNKS,
        )  # fmt: skip

        # 2. mean(g) and mean(g x̂); this block's part of dw and db. Columns past E hold 0.
        grads = ()
        sum_g = tl.zeros([ROWS], tl.float32)
        sum_gx = tl.zeros([ROWS], tl.float32)
        more_dw = ()
        more_db = ()
        for i in tl.static_range(CHUNKS):
            cols = i * CHUNK + lanes
            mask = (rows < R) & (cols < E)
            dy = tl.load(dy_ptr + rows * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
            normed = (pieces[i] - mean) * rstd  # x̂
            g = dy * tl.load(w_ptr + cols, mask=cols < E, other=0.0)
            sum_g += tl.sum(g, axis=1)
            sum_gx += tl.sum(g * normed, axis=1)
            grads = grads + (g,)  # type: ignore  # noqa: RUF005
            more_dw = more_dw + (dw[i] + dy * normed,)  # type: ignore  # noqa: RUF005
            more_db = more_db + (db[i] + dy,)  # type: ignore  # noqa: RUF005
        dw = more_dw
        db = more_db

        # 3. ds, and dx where some of x was dropped.
        mean_g = (sum_g / E)[:, None]
        mean_gx = (sum_gx / E)[:, None]
        for i in tl.static_range(CHUNKS):
            cols = i * CHUNK + lanes
            mask = (rows < R) & (cols < E)
            ds = rstd * (grads[i] - mean_g - (pieces[i] - mean) * rstd * mean_gx)
            if dsum_ptr is not None:
                dsum = tl.load(dsum_ptr + rows * stride_dsum + cols, mask=mask, other=0.0)
                ds += dsum.to(tl.float32)
            cells = rows * E + cols
            tl.store(ds_ptr + cells, ds.to(ds_ptr.dtype.element_ty), mask=mask)
            if seed_ptr is not None:
                keep = keep_rows(seed_ptr, rows, i * CHUNK, threshold,
                                 ROWS, CHUNK)  # fmt: skip
                dx = tl.where(keep, ds * keep_scale, 0.0)
                tl.store(dx_ptr + cells, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    # 4. This program's row of the sums.
    part = tl.program_id(0).to(tl.int64) * E
    for i in tl.static_range(CHUNKS):
        cols = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(dw_ptr + part + cols, tl.sum(dw[i], axis=0), mask=cols < E)
        if HAS_BIAS:
            tl.store(db_ptr + part + cols, tl.sum(db[i], axis=0), mask=cols < E)


def add_layer_norm_bwd(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by name, each in its input's dtype; arguments as in the forward pass.

    Args:
        grad_y: like x, the gradient of the normed rows.
        grad_sum: like x, the gradient of the sum, or None where that was not asked for.
        x: [..., E], at most MAX_GRADIENT_WIDTH columns.
        residual: like x, or None.
        weight: [E].
        bias: [E] or None.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x.
        seed: int64 scalar, wanted where dropout_p > 0.

    Returns:
        x, residual (the same tensor as x's where nothing is dropped), weight and bias.
    """
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    config = pick_config(compute_capability(), width)
    programs = max(1, min(triton.cdiv(rows, config.rows), 4 * multiprocessor_count()))
    ds = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    seed, *drop = dropout_arguments(dropout_p, seed, x.device)
    dx = ds if seed is None else torch.empty_like(ds)
    dw = torch.empty(programs, width, device=x.device)
    db = torch.empty_like(dw) if bias is not None else dw
    if ds.numel() == 0:
        dw.zero_(), db.zero_()
    else:
        rows_x, rows_dy = as_rows(x), as_rows(grad_y)
        rows_r = rows_x if residual is None else as_rows(residual)
        rows_dsum = None if grad_sum is None else as_rows(grad_sum)
        _add_layer_norm_bwd_kernel[(programs,)](
            rows_x, rows_r, weight.contiguous(), rows_dy, rows_dsum, seed, ds, dx, dw, db,
            rows, width, eps, *drop,
            rows_x.stride(0), rows_r.stride(0), rows_dy.stride(0),
            0 if rows_dsum is None else rows_dsum.stride(0),
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
            ROWS=config.rows, CHUNK=config.chunk, CHUNKS=config.chunks, num_warps=config.num_warps,
        )  # fmt: skip
    gradients = {"x": dx, "weight": dw.sum(0).to(weight.dtype)}
    if residual is not None:
        gradients["residual"] = ds
    if bias is not None:
        gradients["bias"] = db.sum(0).to(bias.dtype)
    return gradients
