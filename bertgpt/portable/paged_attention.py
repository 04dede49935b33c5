"""Paged attention on torch's own ops: decoding by batched gathers, chunks as packed attention.

Both read the lengths on the host; on a GPU that is a synchronisation.
"""

from __future__ import annotations

import itertools
import math

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
        buckets = _buckets(lengths.tolist())
        if len(buckets) == 1 and len(buckets[0][0]) == len(q):
            out_BHD, scores_BHS = _decode(
                q, k_pages, v_pages, page_table, lengths, buckets[0][1], left, scale
            )
            return (out_BHD, _lse(scores_BHS).t().contiguous()) if return_lse else out_BHD
        out_BHD = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse_BH = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for rows, longest in buckets:
            index = torch.tensor(rows, device=q.device)
            out_BHD[index], scores_BHS = _decode(
                q[index], k_pages, v_pages, page_table[index], lengths[index], longest, left, scale
            )
            if return_lse:
                lse_BH[index] = _lse(scores_BHS)
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


def _decode(
    q_BHD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    longest: int,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query a sequence, on its last key, so that nothing lies to its right.

    Explicit products: with one query a sequence the scores are small, the fused op is slower, and
    on a CPU it hides NaN.

    Returns:
        out [B, H, D] and the scores [B, H, S], −inf where a key is not seen.
    """
    (B, H, D), (K, N) = q_BHD.shape, k_pages.shape[1:3]
    last_B1 = lengths[:, None].long() - 1
    page = torch.arange((longest - 1) // N + 1, device=q_BHD.device)
    page_ids = page_table.gather(1, page.minimum(last_B1 // N)).long()  # past its last page: that
    key = torch.arange(len(page) * N, device=q_BHD.device)
    dead_BS = key > last_B1
    if left >= 0:
        dead_BS |= key < last_B1 - left

    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    q_BKGD = (q_BHD.to(wide) * scale).view(B, K, H // K, D)
    blocks = _blocks(page_ids, K)
    scores_BKGS = q_BKGD @ _gather(k_pages, blocks).to(wide).mT
    scores_BKGS.masked_fill_(dead_BS[:, None, None], -torch.inf)
    weight_BKGS = scores_BKGS.softmax(dim=-1)
    v_BKSD = _gather(v_pages, blocks).to(wide)
    out_BKGD = weight_BKGS @ v_BKSD
    if not math.isfinite(out_BKGD.sum()):  # perhaps 0 · NaN from a slot that nobody may read
        out_BKGD = weight_BKGS @ v_BKSD.masked_fill(dead_BS[:, None, :, None], 0)
    return out_BKGD.view(B, H, D).to(q_BHD.dtype), scores_BKGS.view(B, H, -1)


def _blocks(page_ids_BM: Tensor, K: int) -> Tensor:
    """Numbers of the (page, head) blocks of each sequence's heads, [B, K, M]."""
    return page_ids_BM[:, None] * K + torch.arange(K, device=page_ids_BM.device)[:, None]


def _gather(pages_PKND: Tensor, blocks_BKM: Tensor) -> Tensor:
    """The pages of each sequence in its order, [B, K, M · N, D]."""
    (B, K, M), (P, _, N, D) = blocks_BKM.shape, pages_PKND.shape
    if pages_PKND.is_contiguous():  # whole blocks, several times as fast
        rows = pages_PKND.view(P * K, N * D).index_select(0, blocks_BKM.flatten())
        return rows.view(B, K, M * N, D)
    return pages_PKND[blocks_BKM // K, blocks_BKM % K].reshape(B, K, M * N, D)
