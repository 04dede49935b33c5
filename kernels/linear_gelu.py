"""Linear layer with GELU in its epilogue: y = GELU(x wᵀ + b).

Maths: z = Σ_k x[m, k] w[n, k] + b[n] in float32, then y = gelu(z), as in gelu.py.
Memory: x and w are read once per tile row and column, through the L2; b once per tile; y is
    written once. The [M, N] pre-activation z never exists in memory.
Grid: one program per BLOCK_M × BLOCK_N tile. Programs run down groups of GROUP_M tile rows before
    they move right, so that the programs alive together share a few slabs of x and w in the L2.
    Two programs fit an SM (registers and shared memory): one's GELU runs under the other's GEMM.
Dims: M rows of x (leading dimensions flattened), N outputs, K inputs; any size, K = 0 included.
    Last strides are 1, row strides anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from bertgpt.kernels.device import compute_capability, multiprocessor_count
from bertgpt.kernels.dropout import dropout_rows
from bertgpt.kernels.gelu import gelu
from bertgpt.kernels.gemm import column_halves, grouped_tile, product_tile
from bertgpt.kernels.layout import as_rows


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options of one GEMM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    group_m: int = 8


def pick_config(
    capability: int,
    itemsize: int,
    ieee: bool,
    m: int,
    n: int,
    multiprocessors: int,
    aligned: bool = True,
) -> Config:
    """The tile for an [m, n] output.

    Args:
        capability: 80, 90, 100 or 120 and their kin.
        itemsize: bytes of an input element, 2 or 4.
        ieee: float32 products on FMA units, not as tf32 on tensor cores.
        m: rows.
        n: columns.
        multiprocessors: of the device: a grid of large tiles that leaves SMs idle is cut finer.
        aligned: sizes, strides and addresses are multiples of 16, so that loads are 16 bytes wide;
            else each element needs an address of its own, and a large tile would spill them.
    """
    if ieee:
        return Config(64, 64, 16, num_warps=4, num_stages=3)
    if not aligned:
        return Config(64, 64, 32, num_warps=4, num_stages=2)
    block_k = 128 // itemsize  # a row of the tile is one 128-byte line
    if m <= 64:  # a few tokens: w's bytes are the cost, so many programs and deep prefetch
        return Config(64, 32, 2 * block_k, num_warps=4, num_stages=3)
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) < multiprocessors or capability >= 120:
        return Config(128, 64, block_k, num_warps=4, num_stages=3)
    # 128 registers and 96 KB let two programs share an SM of sm_90; sm_100 needs no telling.
    max_registers = 128 if 90 <= capability < 100 else None
    return Config(128, 128, block_k, num_warps=8, num_stages=3, max_registers=max_registers)


def unsupported(**call: Any) -> str | None:
    """Nothing beyond what no Triton kernel here does."""
    return None


@triton.jit
def _linear_gelu_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr,
    M, N, K,
    stride_xm, stride_wn,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1. Which tile; its rows past the edge read the last row, and are never stored.
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(offs_m, M - 1)[:, None] * stride_xm + offs_k[None, :]  # [M, K]
    w_ptrs = w_ptr + tl.minimum(offs_n, N - 1)[None, :] * stride_wn + offs_k[:, None]  # [K, N]

    # 2. z = x wᵀ. Past K both sides load 0: their product must not be NaN.
    acc = product_tile(
        x_ptrs, w_ptrs, None, K, 1, 1, not EVEN_K, not EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )

    # 3. Epilogue in float32, rounded once.
    left, right = column_halves(acc, BLOCK_M, BLOCK_N)
    rows = y_ptr + offs_m[:, None] * N  # [BLOCK_M, 1]
    for half in tl.static_range(2):
        z = left if half == 0 else right  # [BLOCK_M, BLOCK_N / 2]
        cols = pid_n * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if HAS_BIAS:
            z += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        y = gelu(z, TANH).to(y_ptr.dtype.element_ty)
        tl.store(rows + cols[None, :], y, mask=(offs_m < M)[:, None] & (cols < N)[None, :])


@dataclass(frozen=True)
class Launch:
    """A product's options: whether products are IEEE float32, and its tile."""

    ieee: bool
    config: Config

    @classmethod
    def of(cls, x: Tensor, w: Tensor, n: int) -> Launch:
        """For rows x [M, K] and a weight of either layout; n outputs."""
        ieee = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        places = (x.shape[1], n, x.stride(0), w.stride(0), x.data_ptr(), w.data_ptr())
        config = pick_config(
            compute_capability(), x.dtype.itemsize, ieee, x.shape[0], n, multiprocessor_count(),
            aligned=all(place % 16 == 0 for place in places),
        )  # fmt: skip
        return cls(ieee, config)

    def grid(self, m: int, n: int) -> tuple[int]:
        """One program a tile."""
        return (triton.cdiv(m, self.config.block_m) * triton.cdiv(n, self.config.block_n),)

    def options(self, k: int) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        c = self.config
        return {
            "PRECISION": "ieee" if self.ieee else "tf32", "EVEN_K": k % c.block_k == 0,
            "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k,
            "GROUP_M": c.group_m, "num_warps": c.num_warps, "num_stages": c.num_stages,
            "maxnreg": c.max_registers,
        }  # fmt: skip


def linear_gelu(x: Tensor, w: Tensor, b: Tensor | None, *, approximate: str) -> Tensor:
    """GELU(x wᵀ + b), x [..., K], w [N, K], b [N] → [..., N] in x's dtype."""
    rows = as_rows(x)
    w = as_rows(w.to(x.dtype))  # float32 weights beside half inputs: rounded once, as torch does
    (m, k), n = rows.shape, w.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        launch = Launch.of(rows, w, n)
        _linear_gelu_kernel[launch.grid(m, n)](
            rows, w, rows if b is None else b.contiguous(), y,
            m, n, k,
            rows.stride(0), w.stride(0),
            HAS_BIAS=b is not None, TANH=approximate == "tanh", **launch.options(k),
        )  # fmt: skip
    return y


def gelu_ffn(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    approximate: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The feed-forward layer: `linear_gelu` up, then a plain GEMM down, which cuBLAS does best."""
    hidden = linear_gelu(x, w_in, b_in, approximate=approximate)
    y = F.linear(hidden, w_out.to(x.dtype), None if b_out is None else b_out.to(x.dtype))
    return dropout_rows(y, dropout_p, seed)
