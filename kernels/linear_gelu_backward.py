"""Gradients of `linear_gelu` and `gelu_ffn` from the pre-activation z that the forward pass kept.

Maths: with h = gelu(z) and dh the gradient of h,  dz = dh · gelu'(z).
    linear_gelu: dh is given. gelu_ffn: dh = g w, g [M, K] its output's gradient, w = w_out [K, N].
    Then dx = dz w_in, dw_in = dzᵀ x, dw_out = gᵀ h and the biases' column sums: plain products and
    reductions, which cuBLAS and torch do best.
Memory: for gelu_ffn g and w are read through the L2, z once, dz and h written once; dh never exists
    in memory, nor is h kept from the forward pass. Keeping z costs one write and one read of [M, N];
    computing it again would cost a GEMM, 2 M N K operations: three times the time of that traffic at
    [16k, 768] → 3072 in bfloat16 by a card's bandwidth and matrix rate.
Grid: as `linear_gelu`; the elementwise kernel has one program for BLOCK elements.
Dims: M rows, N columns of z, K outputs of the layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.gelu import gelu_and_slope
from bertgpt.kernels.gemm import column_halves, grouped_tile, product_tile
from bertgpt.kernels.layout import as_rows
from bertgpt.kernels.linear_gelu import Launch

_BLOCK = 2048  # elements: 16 a lane of 4 warps, two 16-byte accesses in half precision


@triton.jit
def _gelu_bwd_kernel(dh_ptr, z_ptr, dz_ptr, TOTAL, TANH: tl.constexpr, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cells < TOTAL
    z = tl.load(z_ptr + cells, mask=mask, other=0.0).to(tl.float32)
    _, slope = gelu_and_slope(z, TANH)
    dz = tl.load(dh_ptr + cells, mask=mask, other=0.0).to(tl.float32) * slope
    tl.store(dz_ptr + cells, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_ffn_bwd_kernel(
    g_ptr, w_ptr, z_ptr, dz_ptr, h_ptr,
    M, N, K,
    stride_gm, stride_wk,
    TANH: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1. Which tile, and dh = g w.
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(
        g_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_gm, stride_wk,
        False, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    # 2. Epilogue: h again from z, and dz; a quarter of the columns at a time, for its registers.
    left, right = column_halves(acc, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        outer, inner = column_halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(2):
            dh = outer if quarter == 0 else inner  # [BLOCK_M, BLOCK_N / 4]
            first = (2 * half + quarter) * (BLOCK_N // 4)
            cols = pid_n.to(tl.int64) * BLOCK_N + first + tl.arange(0, BLOCK_N // 4)
            cells = offs_m[:, None] * N + cols[None, :]
            mask = (offs_m < M)[:, None] & (cols < N)[None, :]
            z = tl.load(z_ptr + cells, mask=mask, other=0.0).to(tl.float32)
            h, slope = gelu_and_slope(z, TANH)
            tl.store(h_ptr + cells, h.to(h_ptr.dtype.element_ty), mask=mask)
            tl.store(dz_ptr + cells, (dh * slope).to(dz_ptr.dtype.element_ty), mask=mask)


def gelu_bwd(dh: Tensor, z: Tensor, *, approximate: str) -> Tensor:
    """dz = dh · gelu'(z); both of one shape, z contiguous; in z's dtype."""
    dh, dz = dh.contiguous(), torch.empty_like(z)
    if z.numel() > 0:
        _gelu_bwd_kernel[(triton.cdiv(z.numel(), _BLOCK),)](
            dh, z, dz, z.numel(), TANH=approximate == "tanh", BLOCK=_BLOCK, num_warps=4
        )
    return dz


def gelu_ffn_bwd(
    grad: Tensor, w_out: Tensor, z: Tensor, *, approximate: str
) -> tuple[Tensor, Tensor]:
    """dz and h of the feed-forward layer.

    Args:
        grad: [M, K], the gradient of its output.
        w_out: [K, N], in grad's dtype.
        z: [M, N], contiguous.
        approximate: "none" (erf) or "tanh".

    Returns:
        dz and h = gelu(z), like z.
    """
    grad, w = as_rows(grad), as_rows(w_out)
    (m, k), n = grad.shape, w.shape[1]
    dz, h = torch.empty_like(z), torch.empty_like(z)
    if z.numel() > 0:
        launch = Launch.of(grad, w, n)
        _gelu_ffn_bwd_kernel[launch.grid(m, n)](
            grad, w, z, dz, h,
            m, n, k,
            grad.stride(0), w.stride(0),
            TANH=approximate == "tanh", **launch.options(k),
        )  # fmt: skip
    return dz, h
