"""Cross-entropy of a linear layer's scores, row by row, the scores never in memory.

Maths: z = Σ_k x[t, k] w[v, k] + b[v] in float32; lse[t] = log Σ_v exp z[t, v], by a running maximum
    and sum over vocabulary tiles; loss[t] = lse[t] − z[t, label]. Rows whose label is ignored give
    0; the others are reached through `order`, which lists them first, so nothing waits for their
    number to come to the host.
Memory: x and w are read once per tile row and column, through the L2. Written: one float32 for each
    row and run of `split` tokens, [V / split, T], and one score a row.
Grid: one program per BLOCK_M rows and `split` tokens; they run down groups of GROUP_M row tiles
    before they move right. Programs past the last row that counts end at once. Then one program
    per 128 rows merges the runs. A run's length depends on nothing but V's own order, so a row's
    loss does not depend on its batch.
Dims: T rows, V tokens, E inputs; any size, 0 included. Last strides are 1, row strides anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bertgpt.kernels.device import compute_capability
from bertgpt.kernels.gemm import grouped_tile, product_tile
from bertgpt.kernels.layout import as_rows
from bertgpt.kernels.primitives import LOG2E

_MERGE_ROWS = 128
# Float32 weights beside half inputs are rounded a slab at a time: never a second copy of the whole.
_CAST_BYTES = 16 << 20


@dataclass(frozen=True)
class Config:
    """Tile shape and launch options; `split` is how many tokens one program runs through."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    split: int = 1024
    group_m: int = 32


def pick_config(
    capability: int, itemsize: int, ieee: bool, aligned: bool, adds: bool = False
) -> Config:
    """The tile, whatever the number of rows: another could sum a row in another order.

    Args:
        capability: 80, 90, 100 or 120 and their kin.
        itemsize: bytes of an input element, 2 or 4.
        ieee: float32 products on FMA units, not as tf32 on tensor cores.
        aligned: sizes, strides and addresses are multiples of 16, so that loads are 16 bytes wide.
        adds: a product of the backward pass, added to its part of a gradient: such a part has few
            tiles, so they are narrower, and reading what is there costs registers.
    """
    if ieee or not aligned:  # an address, or a float32 product, for each element costs registers
        # Left to itself, sm_120's compiler holds float32 sums below the registers they need.
        return Config(
            64, 64, 16, num_warps=4, num_stages=2, max_registers=128 if ieee and adds else None
        )
    block_k = 128 // itemsize  # a row of the tile is one 128-byte line
    if adds or capability >= 120:
        return Config(128, 64, block_k, num_warps=4, num_stages=3)
    # 128 registers and 96 KB let two programs share an SM of sm_90: one's exponentials run under
    # the other's product.
    max_registers = 128 if 90 <= capability < 100 else None
    return Config(128, 128, block_k, num_warps=8, num_stages=3, max_registers=max_registers)


def unsupported(**call: Any) -> str | None:
    """Nothing beyond what no Triton kernel here does."""
    return None


@triton.jit
def column_of(label, first, V):
    """The label's column among V tokens from `first` on, int32; −1 where it is not among them."""
    column = label.to(tl.int64) - first
    return tl.where((column >= 0) & (column < V), column, -1).to(tl.int32)


@triton.jit
def _linear_cross_entropy_kernel(
    x_ptr, w_ptr, b_ptr, order_ptr, label_ptr, count_ptr, lse_ptr, score_ptr,
    first, T, V, E,
    stride_xt, stride_wv,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # 1. Which rows, of those that count, and which run of tokens.
    count = tl.load(count_ptr)
    pid_m, split = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(V, SPLIT), GROUP_M)
    if pid_m * BLOCK_M >= count:
        return
    place = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(order_ptr + tl.minimum(place, count - 1))  # [BLOCK_M], int64
    label = column_of(tl.load(label_ptr + rows), first, V)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xt + offs_k[None, :]  # [BLOCK_M, BLOCK_K]

    # 2. The run's tiles: scores, then a step of the running maximum m_i and sum l_i.
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    score = tl.zeros([BLOCK_M], dtype=tl.float32)
    begin = split.to(tl.int32) * SPLIT
    stop = tl.minimum(V, begin + SPLIT)
    for start in range(begin, stop, BLOCK_N):
        tokens = tl.minimum(start + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        w_ptrs = w_ptr + tokens[None, :] * stride_wv + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
        z = product_tile(
            x_ptrs, w_ptrs, None, E, 1, 1, not EVEN_K, not EVEN_K, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # Half a tile at a time, which halves the registers of the exponentials.
        left, right = z.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            z = left if half == 0 else right  # [BLOCK_M, BLOCK_N / 2]
            cols = start + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            if HAS_BIAS:
                z += tl.load(b_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
            z = tl.where(cols[None, :] < V, z, float("-inf"))
            score += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), 1)
            m_new = tl.maximum(m_i, tl.max(z, 1))
            shift = tl.where(tl.abs(m_new) == float("inf"), 0.0, m_new)  # inf - inf is NaN
            p = tl.exp2((z - shift[:, None]) * LOG2E)
            l_i = l_i * tl.exp2((m_i - shift) * LOG2E) + tl.sum(p, 1)
            m_i = m_new

    # 3. This run's log-sum-exp, and the label's score where the label lies in it.
    shift = tl.where(tl.abs(m_i) == float("inf"), 0.0, m_i)
    tl.store(lse_ptr + split * T + place, shift + tl.log(l_i), mask=place < count)
    inside = (label >= begin) & (label < stop) & (place < count)
    tl.store(score_ptr + place, score, mask=inside)


@triton.jit
def _merge_runs_kernel(
    partial_ptr, score_ptr, order_ptr, count_ptr, loss_ptr, lse_ptr, T, RUNS, BLOCK_M: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    counts = place < tl.load(count_ptr)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    partial_ptrs = partial_ptr + place
    for _ in range(RUNS):
        part = tl.load(partial_ptrs, mask=counts, other=float("-inf"))
        partial_ptrs += T
        m_new = tl.maximum(m_i, part)
        shift = tl.where(tl.abs(m_new) == float("inf"), 0.0, m_new)
        l_i = l_i * tl.exp2((m_i - shift) * LOG2E) + tl.exp2((part - shift) * LOG2E)
        m_i = m_new
    lse = tl.where(tl.abs(m_i) == float("inf"), 0.0, m_i) + tl.log(l_i)
    score = tl.load(score_ptr + place, mask=counts, other=0.0)
    rows = tl.load(order_ptr + place, mask=place < T, other=0)
    tl.store(lse_ptr + rows, tl.where(counts, lse, 0.0), mask=place < T)
    tl.store(loss_ptr + rows, tl.where(counts, lse - score, 0.0), mask=place < T)


def row_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, float32, shaped like labels; hidden [..., E], w [V, E]."""
    x, w = as_rows(hidden), as_rows(weight)
    (rows, width), tokens = x.shape, w.shape[0]
    losses, lse = (torch.empty(labels.shape, device=x.device) for _ in range(2))
    if rows == 0:
        return losses, lse
    order, count = labelled_first(labels, ignore_index)
    config = config_for(pick_config, x, w)
    ieee = products_are_ieee(x.dtype)
    runs = torch.empty(triton.cdiv(tokens, config.split), rows, device=x.device)
    scores = torch.full((rows,), torch.nan, device=x.device)  # stays NaN for a label outside [0, V)
    for first, w_part, b_part in vocabulary_slabs(w, bias, x.dtype, config.split):
        row_tiles, parts = triton.cdiv(rows, config.block_m), triton.cdiv(len(w_part), config.split)
        _linear_cross_entropy_kernel[(row_tiles * parts,)](
            x, w_part, w_part if b_part is None else b_part,
            order, labels.contiguous(), count, runs[first // config.split :], scores,
            first, rows, len(w_part), width,
            x.stride(0), w_part.stride(0),
            HAS_BIAS=b_part is not None, PRECISION="ieee" if ieee else "tf32",
            EVEN_K=width % config.block_k == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            SPLIT=config.split, GROUP_M=config.group_m,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        )  # fmt: skip
    _merge_runs_kernel[(triton.cdiv(rows, _MERGE_ROWS),)](
        runs, scores, order, count, losses, lse, rows, len(runs), BLOCK_M=_MERGE_ROWS, num_warps=4
    )
    return losses, lse


def labelled_first(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Rows with a label, in their order, then the ignored ones (int64 [T]); how many have one."""
    ignored = (labels == ignore_index).flatten()
    order = ignored.to(torch.uint8).argsort(stable=True)
    return order, ignored.logical_not().sum(dtype=torch.int32)


def products_are_ieee(dtype: torch.dtype) -> bool:
    """Whether products must be IEEE float32, as torch's own setting says."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def config_for(pick: Any, x: Tensor, w: Tensor, *, adds: bool = False) -> Config:
    """What `pick`, a `pick_config`, answers for operands of these widths, strides and addresses."""
    places = (x.shape[1], x.stride(0), w.stride(0), x.data_ptr(), w.data_ptr())
    aligned = all(place % 16 == 0 for place in places)
    config: Config = pick(
        compute_capability(), x.dtype.itemsize, products_are_ieee(x.dtype), aligned, adds
    )
    return config


def vocabulary_slabs(
    w: Tensor, bias: Tensor | None, dtype: torch.dtype, multiple: int, columns: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Slabs of the vocabulary: first token, its rows of w in dtype, its bias.

    Args:
        w: [V, E].
        bias: [V] or None.
        dtype: of the products.
        multiple: what the first token of each slab is a multiple of.
        columns: tokens a slab; None takes all, or what fits _CAST_BYTES where w must be converted.
    """
    if columns is None:
        columns = max(len(w), 1)
        if w.dtype != dtype:
            columns = max(_CAST_BYTES // max(w.shape[1] * dtype.itemsize, 1), 1)
    columns = triton.cdiv(columns, multiple) * multiple
    bias = None if bias is None else bias.contiguous()
    for first in range(0, len(w), columns):
        slab = slice(first, first + columns)
        yield first, w[slab].to(dtype), None if bias is None else bias[slab]
