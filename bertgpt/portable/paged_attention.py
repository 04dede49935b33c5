"""Paged attention on torch's own ops: decoding by batched gathers, chunks as packed attention.

Both read the lengths on the host; on a GPU that is a synchronisation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bertgpt.portable.attention import attention

# A bucket may gather a quarter more keys than it has, or this many where buckets cost more.
_DENSITY = 0.8
_FREE_PADDING = 256


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int = 1,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `bertgpt.ops.paged_attention` computes; the arguments are described there."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = window or (-1, -1)
    right = 0 if causal else right
    with torch.no_grad():
        if cu_seqlens_q is not None:
            k_TKD, cu_seqlens_k = _pack(k_pages, page_table, lengths)
            v_TKD, _ = _pack(v_pages, page_table, lengths)
            return attention(
                q.detach(), k_TKD, v_TKD, window=(left, right), scale=scale,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=return_lse,
            )  # fmt: skip
        out_BHD = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse_BH = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for bucket in _plan(page_table, lengths, k_pages, left):
            out_RHD, scores_RHS = _decode(q, k_pages, v_pages, bucket, scale)
            out_BHD.index_copy_(0, bucket.rows, out_RHD)
            if return_lse:
                lse_BH.index_copy_(0, bucket.rows, _lse(scores_RHS))
    return (out_BHD, lse_BH.t().contiguous()) if return_lse else out_BHD


def _lse(scores_BHS: Tensor) -> Tensor:
    return scores_BHS.logsumexp(dim=-1).float()


def _pack(pages_PKND: Tensor, page_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence's tokens after one another, [T', K, D], and where each starts, [B + 1]."""
    page_size = pages_PKND.shape[2]
    starts = torch.tensor([0, *itertools.accumulate(lengths.tolist())], device=lengths.device)
    sequence = torch.repeat_interleave(lengths.long())
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
    page_ids = page_table[sequence, position // page_size].long()
    return pages_PKND[page_ids, :, position % page_size], starts


def _buckets(lengths: list[int]) -> list[tuple[list[int], int]]:
    """Sequences (by number) of like lengths together, each time with the longest length.

    Those without keys are left out.
    """
    buckets: list[tuple[list[int], int]] = []
    keys = 0
    for row in sorted((r for r, n in enumerate(lengths) if n), key=lambda r: -lengths[r]):
        keys += lengths[row]
        rows, longest = buckets[-1] if buckets else ([], 0)
        padded = longest * (len(rows) + 1)
        if rows and padded <= max(keys / _DENSITY, keys + _FREE_PADDING):
            rows.append(row)
        else:
            buckets.append(([row], lengths[row]))
            keys = lengths[row]
    return [(sorted(rows), longest) for rows, longest in buckets]


@dataclass(frozen=True)
class _Bucket:
    """Sequences of like lengths, decoded together.

    Attributes:
        rows: [R], their numbers.
        blocks_RKM: Numbers of the (page, head) blocks of each one's heads.
        dead_RS: True at keys that its query does not see.
    """

    rows: Tensor
    blocks_RKM: Tensor
    dead_RS: Tensor


def _plan(page_table: Tensor, lengths: Tensor, k_pages: Tensor, left: int) -> list[_Bucket]:
    """The buckets of a batch; every layer of a step asks for the same, so the last are kept."""
    (_, K, N, _), counts = k_pages.shape, tuple(lengths.tolist())
    used = page_table[:, : -(-max(counts, default=0) // N)].tolist()
    return _planned(counts, tuple(map(tuple, used)), K, N, left, k_pages.device)


@lru_cache(maxsize=4)
def _planned(
    lengths: tuple[int, ...],
    pages: tuple[tuple[int, ...], ...],
    K: int,
    N: int,
    left: int,
    device: torch.device,
) -> list[_Bucket]:
    """By values alone, so that what is kept cannot go stale when a table changes in place."""
    buckets = []
    for rows, longest in _buckets(list(lengths)):
        last_R1 = torch.tensor([[lengths[row] - 1] for row in rows], device=device)
        page = torch.arange(-(-longest // N), device=device)
        ids_RM = torch.tensor([pages[row][: len(page)] for row in rows], device=device)
        ids_RM = ids_RM.gather(1, page.minimum(last_R1 // N))  # past its last page: that
        key = torch.arange(len(page) * N, device=device)
        dead_RS = key > last_R1
        if left >= 0:
            dead_RS |= key < last_R1 - left
        blocks_RKM = ids_RM[:, None] * K + torch.arange(K, device=device)[:, None]
        buckets.append(_Bucket(torch.tensor(rows, device=device), blocks_RKM, dead_RS))
    return buckets


def _decode(
    q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, bucket: _Bucket, scale: float
) -> tuple[Tensor, Tensor]:
    """One query a sequence, on its last key, so that nothing lies to its right.

    Explicit products: with one query a sequence the scores are small, the fused op is slower, and
    on a CPU it hides NaN.

    Returns:
        out [R, H, D] and the scores [R, H, S], −inf where a key is not seen.
    """
    (_, H, D), K, (R, _, _) = q_BHD.shape, k_pages.shape[1], bucket.blocks_RKM.shape
    dead_RS, wide = bucket.dead_RS, torch.promote_types(q_BHD.dtype, torch.float32)
    q_RKGD = (q_BHD.index_select(0, bucket.rows).to(wide) * scale).view(R, K, H // K, D)
    scores_RKGS = q_RKGD @ _gather(k_pages, bucket.blocks_RKM).to(wide).mT
    scores_RKGS.masked_fill_(dead_RS[:, None, None], -torch.inf)
    weight_RKGS = scores_RKGS.softmax(dim=-1)
    v_RKSD = _gather(v_pages, bucket.blocks_RKM).to(wide)
    out_RKGD = weight_RKGS @ v_RKSD
    if not math.isfinite(out_RKGD.sum()):  # perhaps 0 · NaN from a slot that nobody may read
        out_RKGD = weight_RKGS @ v_RKSD.masked_fill(dead_RS[:, None, :, None], 0)
    return out_RKGD.view(R, H, D).to(q_BHD.dtype), scores_RKGS.view(R, H, -1)


def _gather(pages_PKND: Tensor, blocks_RKM: Tensor) -> Tensor:
    """The pages of each sequence in its order, [R, K, M · N, D]."""
    (R, K, M), (P, _, N, D) = blocks_RKM.shape, pages_PKND.shape
    if pages_PKND.is_contiguous():  # whole blocks, several times as fast
        rows = pages_PKND.view(P * K, N * D).index_select(0, blocks_RKM.flatten())
        return rows.view(R, K, M * N, D)
    return pages_PKND[blocks_RKM // K, blocks_RKM % K].reshape(R, K, M * N, D)
