"""LayerNorm(dropout(x) + residual), the sum kept in registers from its statistics to its output.

Maths: s = dropout(x) + r;  μ = Σ s / E;  σ² = Σ (s − μ)² / E;  y = (s − μ) / √(σ² + eps) · w + b,
    in float32 and rounded once. The variance is taken about the mean already found, in a second
    pass over registers: Σ s² − E μ² would cancel.
Memory: x and r are read once, y (and s, when asked for) written once; w and b once per program,
    from the L2.
Grid: one program per ROWS rows.
Dims: R rows (leading dimensions flattened), E columns in CHUNKS pieces of CHUNK: a row of 768 is
    three full pieces of 256 rather than three quarters of 1024. Narrow rows get a warp each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.dropout import dropout_arguments, keep_rows
from bertgpt.kernels.layout import as_rows

MAX_WIDTH = 16384  # 16 warps of 32 float32 a lane; twice that spills
MAX_GRADIENT_WIDTH = 4096  # a row, its gradient and two sums in the registers of 16 warps


@dataclass(frozen=True)
class Config:
    """How a row is cut up and who holds it."""

    rows: int
    chunk: int
    chunks: int
    num_warps: int


def pick_config(capability: int, width: int) -> Config:
    """The cut for rows of `width` columns, 1 … MAX_WIDTH; the same on every capability so far."""
    if width <= 1024:  # a warp a row: the reductions need no shared memory
        chunk = min(256, max(32, triton.next_power_of_2(width)))
        return Config(4, chunk, triton.cdiv(width, chunk), num_warps=4)
    chunk, num_warps = (1024, 4) if width <= 4096 else (4096, 16)
    return Config(1, chunk, triton.cdiv(width, chunk), num_warps)


def unsupported(*, x: Tensor, needs_grad: bool, **call: Any) -> str | None:
    """Rows too wide for registers."""
    width, most = x.shape[-1], MAX_GRADIENT_WIDTH if needs_grad else MAX_WIDTH
    if width > most:
        what = "and their gradients " if needs_grad else ""
        return f"rows of {width} columns {what}do not fit registers (at most {most})"
    return None


@triton.jit
def sum_and_moments(
    x_ptr, r_ptr, s_ptr, seed_ptr, rows, lanes, R, E, eps, threshold, keep_scale,
    stride_x, stride_r,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Pieces [ROWS, CHUNK] of dropout(x) + residual in float32, their mean and 1/√(σ² + eps)."""
    # The sum, piece by piece, and its mean. Columns past E hold 0.
    pieces = ()
    total = tl.zeros([ROWS], dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        cols = i * CHUNK + lanes
        mask = (rows < R) & (cols < E)  # [ROWS, CHUNK]
        s = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            keep = keep_rows(seed_ptr, rows, i * CHUNK, threshold, ROWS, CHUNK)
            s = tl.where(keep, s * keep_scale, 0.0)
        if HAS_RESIDUAL:
            s += tl.load(r_ptr + rows * stride_r + cols, mask=mask, other=0.0).to(tl.float32)
        if s_ptr is not None:
            tl.store(s_ptr + rows * E + cols, s.to(s_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(s, axis=1)
        pieces = pieces + (s,)  # type: ignore  # noqa: RUF005 (no starred tuples in Triton)
    mean = (total / E)[:, None]  # [ROWS, 1]
    # The variance about that mean.
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        centred = tl.where(i * CHUNK + lanes < E, pieces[i] - mean, 0.0)
        squares += tl.sum(centred * centred, axis=1)
    return pieces, mean, (1.0 / tl.sqrt(squares / E + eps))[:, None]


@triton.jit(do_not_specialize=["threshold"])
def _add_layer_norm_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, seed_ptr, y_ptr, s_ptr,
    R, E, eps, threshold, keep_scale,
    stride_x, stride_r,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # 1. The sum and its moments.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    lanes = tl.arange(0, CHUNK)[None, :]  # [1, CHUNK]
    pieces, mean, rstd = sum_and_moments(
        x_ptr, r_ptr, s_ptr, seed_ptr, rows, lanes, R, E, eps, threshold, keep_scale,
        stride_x, stride_r, HAS_RESIDUAL, ROWS, CHUNK, CHUNKS,
    )  # fmt: skip

    # 2. Scale, shift, round, store.
    for i in tl.static_range(CHUNKS):
        cols = i * CHUNK + lanes
        y = (pieces[i] - mean) * rstd * tl.load(w_ptr + cols, mask=cols < E, other=0.0)
        if HAS_BIAS:
            y += tl.load(b_ptr + cols, mask=cols < E, other=0.0).to(tl.float32)
        mask = (rows < R) & (cols < E)
        tl.store(y_ptr + rows * E + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm(dropout(x) + residual) over the last dimension, and the sum; contiguous, like x."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if return_sum else None
    if y.numel() == 0:
        return y, total
    rows_x = as_rows(x)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows_r = rows_x if residual is None else as_rows(residual)
    seed, *drop = dropout_arguments(dropout_p, seed, x.device)
    config = pick_config(compute_capability(), width)
    grid = (triton.cdiv(rows_x.shape[0], config.rows),)
    _add_layer_norm_kernel[grid](
        rows_x, rows_r, weight, weight if bias is None else bias, seed, y, total,
        rows_x.shape[0], width, eps, *drop,
        rows_x.stride(0), rows_r.stride(0),
        HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
        ROWS=config.rows, CHUNK=config.chunk, CHUNKS=config.chunks, num_warps=config.num_warps,
    )  # fmt: skip
    return y, total
