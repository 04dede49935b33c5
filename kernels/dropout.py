"""The dropout bits of docs/dropout.md, for a tile: Philox-4x32-10 by counter, four words each.

`dropout_rows` is dropout by itself, where there is no kernel to fuse it with: x is read once and y
written once, by one program for ROWS × COLS cells.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.layout import as_rows

_ROWS, _COLS = 4, 512


@triton.jit
def _keep(
    seed_ptr, col_first, c1, c2, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Which cells [ROWS, COLS] are kept, by the counters (col // 4, c1, c2, stream).

    One counter serves four neighbouring columns; col_first is a multiple of four. c1 and c2 are
    [ROWS, 1] or scalars.
    """
    groups = col_first // 4 + tl.arange(0, COLS // 4)
    zeros = tl.zeros([ROWS, COLS // 4], tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(seed_ptr),
        zeros + groups[None, :].to(tl.uint32),
        zeros + c1.to(tl.uint32),
        zeros + c2.to(tl.uint32),
        zeros + stream,
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # col % 4 = 2·third + last
    return tl.reshape(words, [ROWS, COLS]) >= threshold.to(tl.uint32)


@triton.jit
def keep_rows(seed_ptr, rows, col_first, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which cells [ROWS, COLS] of a matrix dropout keeps; rows [ROWS, 1] int64."""
    return _keep(seed_ptr, col_first, rows, rows >> 32, 0, threshold, ROWS, COLS)


@triton.jit
def keep_weights(
    seed_ptr, batch_head, queries, key_first, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which attention weights [BLOCK_M, BLOCK_N] dropout keeps; queries [BLOCK_M]."""
    return _keep(seed_ptr, key_first, queries[:, None], batch_head, 1, threshold, BLOCK_M, BLOCK_N)


@triton.jit
def drop_weights(
    p, seed_ptr, batch_head, queries, key_first, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention weights [BLOCK_M, BLOCK_N] with the dropped ones 0; as they are without a seed."""
    if seed_ptr is not None:
        keep = keep_weights(seed_ptr, batch_head, queries, key_first, threshold, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    return p


def dropout_arguments(
    dropout_p: float, seed: Tensor | None, device: torch.device
) -> tuple[Tensor | None, int, float]:
    """The seed in a kernel's reach (None where nothing is dropped), threshold, and kept scale."""
    if dropout_p == 0.0 or seed is None:
        return None, 0, 1.0
    threshold = min(math.floor(dropout_p * 2**32), 2**32 - 1)  # of p = 1, the scale drops all
    return seed.to(device), threshold, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


@triton.jit(do_not_specialize=["threshold"])
def _dropout_rows_kernel(
    x_ptr, seed_ptr, y_ptr, R, E, threshold, keep_scale, stride_x,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(E, COLS)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % tiles * COLS
    cols = first + tl.arange(0, COLS)
    mask = (rows < R)[:, None] & (cols < E)[None, :]  # [ROWS, COLS]
    x = tl.load(x_ptr + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0)
    keep = keep_rows(seed_ptr, rows[:, None], first, threshold, ROWS, COLS)
    y = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0)
    y_ptrs = y_ptr + rows[:, None] * E + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout_rows(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x [..., E] by (row, column), rows flattened; contiguous, or x itself at p = 0."""
    seed, *drop = dropout_arguments(dropout_p, seed, x.device)
    if seed is None or x.numel() == 0:
        return x
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (count, width), cells = rows.shape, (_ROWS, _COLS)
    _dropout_rows_kernel[(triton.cdiv(count, _ROWS) * triton.cdiv(width, _COLS),)](
        rows, seed, y, count, width, *drop, rows.stride(0), *cells, num_warps=4
    )
    return y
