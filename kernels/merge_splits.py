"""Puts together the results of attention over splits of the keys (Flash-Decoding, 2023).

Maths: out = Σ_s e^(lse_s - lse) out_s and lse = ln Σ_s e^(lse_s), over the splits that hold keys.

Memory: the partial rows of live splits cross HBM once, out and lse once; others are not touched.

Grid: one axis of sequences · tokens · heads, heads fastest; one program a row.

Bits: splits are taken in order, eight at a time, however many the workspace has room for.

Dims: S splits, T tokens, H query heads, D head_dim padded to BLOCK_D.
"""

import torch
import triton
import triton.language as tl

from bertgpt.kernels.primitives import LOG2E, packed_span

_BLOCK_S = 8


# fmt: off
@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_splits", "max_seqlen_q"])
def _merge_splits_kernel(
    part_ptr, part_lse_ptr, lengths_ptr, cu_q_ptr, out_ptr, lse_ptr,
    num_tokens, num_heads, num_splits, max_seqlen_q,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_S: tl.constexpr,
):
    # fmt: on
    # 1. This program's row, and how many splits hold keys of its sequence.
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    pid = tl.program_id(0) // num_heads
    token = pid % max_seqlen_q
    seq = (pid // max_seqlen_q).to(tl.int64)
    start_q = seq
    len_q = 1
    if cu_q_ptr is not None:
        start_q, len_q = packed_span(cu_q_ptr, seq, num_tokens)
    if token >= len_q:
        return
    length = tl.load(lengths_ptr + seq).to(tl.int64)
    live = tl.cdiv(tl.maximum(length, 0), SPLIT_KEYS)
    live = tl.minimum(live, num_splits).to(tl.int32)
    row = start_q + token
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM

    # 2. The largest lse, then the weighted sum in blocks of BLOCK_S from split 0: one order.
    largest = tl.full([], float("-inf"), tl.float32)
    for first in range(0, live, BLOCK_S):
        split = (first + offs_s).to(tl.int64)
        lse_ptrs = part_lse_ptr + (split * num_heads + head) * num_tokens + row
        lse_s = tl.load(lse_ptrs, mask=split < live, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(lse_s, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, live, BLOCK_S):
        split = (first + offs_s).to(tl.int64)
        lse_ptrs = part_lse_ptr + (split * num_heads + head) * num_tokens + row
        lse_s = tl.load(lse_ptrs, mask=split < live, other=float("-inf"))
        weight = tl.exp2((lse_s - shift) * LOG2E)  # [BLOCK_S]
        part_rows = ((split * num_tokens + row) * num_heads + head) * HEAD_DIM
        part_ptrs = part_ptr + part_rows[:, None] + offs_d[None, :]
        part_mask = (split < live)[:, None] & mask_d[None, :]
        part = tl.load(part_ptrs, mask=part_mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        acc += tl.sum(weight[:, None] * part, 0)
        total += tl.sum(weight, 0)

    # 3. One live split merges to itself, bit for bit: its weight is 1.
    keyless = total == 0.0
    total = tl.where(keyless, 1.0, total)
    out = tl.where(keyless, 0.0, acc / total)
    out_ptrs = out_ptr + (row * num_heads + head) * HEAD_DIM + offs_d
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    if lse_ptr is not None:
        lse = tl.where(keyless, float("-inf"), largest + tl.log(total))
        tl.store(lse_ptr + head * num_tokens + row, lse)


def merge_splits(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    lengths: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int,
    split_keys: int,
) -> None:
    """Writes the merged rows to `out` and `lse`.

    Args:
        part: [S, T, H, D] float32, each split's softmax-weighted mean of its values.
        part_lse: [S, H, T] float32, natural logarithm; −inf where a split has no visible key.
        out: [T, H, D], contiguous.
        lse: [H, T] float32, contiguous, or None.
        lengths: [B] integers; splits that start at or past a sequence's length are not read.
        cu_seqlens_q: [B + 1] first token of each sequence, then T; None: one token a sequence.
        max_seqlen_q: Most tokens of a sequence.
        split_keys: Keys of a split.
    """
    splits, tokens, heads, dim = part.shape
    # fmt: off
    _merge_splits_kernel[(lengths.shape[0] * max_seqlen_q * heads,)](
        part, part_lse, lengths, cu_seqlens_q, out, lse,
        tokens, heads, splits, max_seqlen_q,
        HEAD_DIM=dim, BLOCK_D=triton.next_power_of_2(dim), SPLIT_KEYS=split_keys, BLOCK_S=_BLOCK_S,
        num_warps=1,
    )
    # fmt: on
