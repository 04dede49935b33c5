"""The states of each packed sequence to one vector: the first, the mean or the maximum.

Maths: v = x[first],  Σ x / L  or  max x, by column over the L tokens of a sequence; where asked
    for, v / max(|v|, 1e-12). In float32, rounded once. NaN spreads, as in torch's maximum.
Memory: x is read once ("cls": its first rows alone), the vectors are written once.
Grid: one program per sequence: |v| needs the whole row, and there are tens of sequences or more.
Dims: E columns held at once, BLOCK_T tokens a turn: a tile [BLOCK_T, BLOCK_E] of at most 16
    elements a lane, in flight while the one before is summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.layout import as_rows

MAX_WIDTH = 8192


@dataclass(frozen=True)
class Config:
    """The tile that a program holds, and its warps."""

    block_t: int
    block_e: int
    num_warps: int


def pick_config(capability: int, width: int) -> Config:
    """The tile for `width` columns, 1 … MAX_WIDTH; the same on every capability so far."""
    block_e = max(32, triton.next_power_of_2(width))
    num_warps = 4 if block_e <= 1024 else 8 if block_e <= 4096 else 16
    return Config(min(16, 512 * num_warps // block_e), block_e, num_warps)


def unsupported(*, x: Tensor, **call: Any) -> str | None:
    """Rows too wide for registers."""
    if x.shape[1] > MAX_WIDTH:
        return f"rows of {x.shape[1]} columns do not fit registers (at most {MAX_WIDTH})"
    return None


@triton.jit
def _pool_kernel(
    x_ptr, cu_seqlens_ptr, out_ptr,
    T, E, stride_x,
    POOLING: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    # 1. The sequence's tokens; clamped, so that no boundary leads outside x.
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), T)
    cols = tl.arange(0, BLOCK_E)  # [BLOCK_E]

    # 2. One vector.
    if POOLING == "cls":
        mask = (cols < E) & (first < end)
        vector = tl.load(x_ptr + first * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        empty = -float("inf") if POOLING == "max" else 0.0
        total = tl.full([BLOCK_T, BLOCK_E], empty, dtype=tl.float32)
        for start in range(first, end, BLOCK_T):
            rows = (start + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)  # [BLOCK_T, 1]
            mask = (rows < end) & (cols[None, :] < E)
            x = tl.load(x_ptr + rows * stride_x + cols[None, :], mask=mask, other=empty)
            x = x.to(tl.float32)  # [BLOCK_T, BLOCK_E]
            if POOLING == "max":
                total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += x
        if POOLING == "max":
            nan = tl.max((total != total).to(tl.int32), axis=0) != 0  # tl.max leaves NaN out
            vector = tl.where(nan, float("nan"), tl.max(total, axis=0))
            vector = tl.where((cols < E) & (first < end), vector, 0.0)
        else:
            vector = tl.sum(total, axis=0) / tl.maximum(end - first, 1).to(tl.float32)

    # 3. Its length.
    if NORMALIZE:
        vector = vector / tl.maximum(
            tl.sqrt(tl.sum(vector * vector)), 1e-12, propagate_nan=tl.PropagateNan.ALL
        )
    tl.store(out_ptr + sequence * E + cols, vector.to(out_ptr.dtype.element_ty), mask=cols < E)


def pool(x: Tensor, cu_seqlens: Tensor, *, pooling: str, normalize: bool) -> Tensor:
    """One vector [E] a sequence of x [T, E], float32, float16 or bfloat16; [B, E], contiguous."""
    sequences, width = cu_seqlens.shape[0] - 1, x.shape[1]
    out = torch.empty(sequences, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, cu_seqlens = as_rows(x), cu_seqlens.contiguous()
    config = pick_config(compute_capability(), width)
    _pool_kernel[(sequences,)](
        x, cu_seqlens, out,
        x.shape[0], width, x.stride(0),
        POOLING=pooling, NORMALIZE=normalize,
        BLOCK_T=config.block_t, BLOCK_E=config.block_e, num_warps=config.num_warps,
    )  # fmt: skip
    return out
