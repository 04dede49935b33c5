"""Gradients of `linear_gelu` and `gelu_ffn`; nothing but their inputs is kept from forward.

Maths: with z = x w_inᵀ + b, h = gelu(z) and dh the gradient of h,  dz = dh · gelu'(z).
    linear_gelu: dh is given. gelu_ffn: dh = g w_out, g [M, K] its output's gradient.
    Then dx = dz w_in, dw_in = dzᵀ x, dw_out = gᵀ h, and the biases' are column sums. z and these
    are plain products and sums, which cuBLAS and torch do best; fused is gelu' with the product
    that makes dh.
Memory: g and w_out are read through the L2, z once, dz and h written once; dh never exists in
    memory. z is computed again: to keep it from forward would save a product of 2 M N E operations
    for one write and one read of [M, N], a layer's largest tensor, held in every layer until then.
Grid: as `linear_gelu`; the elementwise kernel has one program for BLOCK elements.
Dims: M rows, E inputs, N columns of z, K outputs of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from bertgpt.kernels.dropout import dropout_rows
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
    # 1. Which tile; its rows past the edge read the last row, and are never stored.
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    g_ptrs = g_ptr + tl.minimum(offs_m, M - 1)[:, None] * stride_gm + offs_k[None, :]  # [M, K]
    w_ptrs = w_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_n[None, :]  # [K, N]

    # 2. dh = g w.
    acc = product_tile(
        g_ptrs, w_ptrs, offs_n < N, K, 1, stride_wk, not EVEN_K, True, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    # 3. Epilogue: h again from z, and dz; a quarter of the columns at a time, for its registers.
    left, right = column_halves(acc, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        outer, inner = column_halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(2):
            dh = outer if quarter == 0 else inner  # [BLOCK_M, BLOCK_N / 4]
            first = (2 * half + quarter) * (BLOCK_N // 4)
            cols = pid_n * BLOCK_N + first + tl.arange(0, BLOCK_N // 4)
            cells = offs_m[:, None] * N + cols[None, :]
            mask = (offs_m < M)[:, None] & (cols < N)[None, :]
            z = tl.load(z_ptr + cells, mask=mask, other=0.0).to(tl.float32)
            h, slope = gelu_and_slope(z, TANH)
            tl.store(h_ptr + cells, h.to(h_ptr.dtype.element_ty), mask=mask)
            tl.store(dz_ptr + cells, (dh * slope).to(dz_ptr.dtype.element_ty), mask=mask)


def _gelu_bwd(dh: Tensor, z: Tensor, tanh: bool) -> Tensor:
    """Dz = dh · gelu'(z); both [M, N], z contiguous; in z's dtype."""
    dh, dz = dh.contiguous(), torch.empty_like(z)
    if z.numel() > 0:
        grid = (triton.cdiv(z.numel(), _BLOCK),)
        _gelu_bwd_kernel[grid](dh, z, dz, z.numel(), TANH=tanh, BLOCK=_BLOCK, num_warps=4)
    return dz


def _gelu_ffn_bwd(grad: Tensor, w_out: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Dz and h = gelu(z), like z [M, N]; grad [M, K] and w_out [K, N] of unit last stride."""
    (m, k), n = grad.shape, w_out.shape[1]
    dz, h = torch.empty_like(z), torch.empty_like(z)
    if z.numel() > 0:
        launch = Launch.of(grad, w_out, n)
        _gelu_ffn_bwd_kernel[launch.grid(m, n)](
            grad, w_out, z, dz, h,
            m, n, k,
            grad.stride(0), w_out.stride(0),
            TANH=tanh, **launch.options(k),
        )  # fmt: skip
    return dz, h


def _of_linear(
    grad: Tensor, x: Tensor, w: Tensor, names: Sequence[str], keys: tuple[str, str, str]
) -> dict[str, Tensor]:
    """Gradients of x, w and b of x wᵀ + b, those of `keys` that are in `names`."""
    made: dict[str, Tensor] = {}
    if keys[0] in names:
        made[keys[0]] = grad @ w
    if keys[1] in names:
        made[keys[1]] = grad.t() @ x
    if keys[2] in names:
        made[keys[2]] = grad.sum(0, dtype=torch.float32)
    return made


def linear_gelu_bwd(
    grad: Tensor, names: Sequence[str], *, x: Tensor, w: Tensor, b: Tensor | None, approximate: str
) -> dict[str, Tensor]:
    """Gradients by name, of those of x, w and b in `names`, each like its input.

    Args:
        grad: [..., N], of the output.
        names: which inputs.
        x: [..., E].
        w: [N, E].
        b: [N] or None.
        approximate: "none" (erf) or "tanh".
    """
    rows, weight, z = _forward(x, w, b)
    dz = _gelu_bwd(as_rows(grad), z, approximate == "tanh")
    made = _of_linear(dz, rows, weight, names, ("x", "w", "b"))
    return _like({"x": x, "w": w, "b": b}, made)


def gelu_ffn_bwd(
    grad: Tensor,
    names: Sequence[str],
    *,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    approximate: str,
    dropout_p: float,
    seed: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by name, of those inputs in `names`, each like its input.

    Args:
        grad: [..., K], of the output.
        names: which inputs.
        x: [..., E].
        w_in: [N, E].
        b_in: [N] or None.
        w_out: [K, N].
        b_out: [K] or None.
        approximate: "none" (erf) or "tanh".
        dropout_p: as in the forward pass.
        seed: likewise.
    """
    rows, weight, z = _forward(x, w_in, b_in)
    g = as_rows(dropout_rows(grad, dropout_p, seed))
    w_out_half = as_rows(w_out.to(x.dtype))
    dz, h = _gelu_ffn_bwd(g, w_out_half, z, approximate == "tanh")
    made = _of_linear(g, h, w_out_half, names, ("", "w_out", "b_out"))
    made |= _of_linear(dz, rows, weight, names, ("x", "w_in", "b_in"))
    inputs = {"x": x, "w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}
    return _like(inputs, made)


def _forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """X as rows, w in x's dtype, and z = x wᵀ + b."""
    rows, weight = as_rows(x), as_rows(w.to(x.dtype))
    return rows, weight, F.linear(rows, weight, None if b is None else b.to(x.dtype))


def _like(inputs: Mapping[str, Tensor | None], made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each gradient in its input's shape and dtype."""
    shaped = {}
    for name, gradient in made.items():
        source = inputs[name]
        assert source is not None
        shaped[name] = gradient.to(source.dtype).view(source.shape)
    return shaped
