"""Paged attention on torch's own ops: decoding by batched gathers, chunks as packed attention.

Both read the lengths on the host; on a GPU that is a synchronisation.
"""

from __future__ import annotations

import itertools

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
        out_THD = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse_TH = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for rows in _buckets(lengths.tolist()):
            index = torch.tensor(rows, device=q.device)
            out_THD[index], lse_TH[index] = _decode(
                q[index], k_pages, v_pages, page_table[index], lengths[index], left, scale
            )
    return (out_THD, lse_TH.t().contiguous()) if return_lse else out_THD


def _pack(pages_PKND: Tensor, page_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence's tokens after one another, [T', K, D], and where each starts, [B + 1]."""
    page_size = pages_PKND.shape[2]
    starts = torch.tensor([0, *itertools.accumulate(lengths.tolist())], device=lengths.device)
    sequence = torch.repeat_interleave(lengths.long())
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
    page_ids = page_table[sequence, position // page_size].long()
    return pages_PKND[page_ids, :, position % page_size], starts


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Sequences (by number) of like lengths together; those without keys are left out."""
    buckets: list[list[int]] = []
    keys = widest = 0
    for row in sorted((r for r, n in enumerate(lengths) if n), key=lambda r: -lengths[r]):
        keys += lengths[row]
        padded = widest * (len(buckets[-1]) + 1) if buckets else 0
        if buckets and padded <= max(keys / _DENSITY, keys + _FREE_PADDING):
            buckets[-1].append(row)
        else:
            buckets.append([row])
            keys = widest = lengths[row]
    return buckets


def _decode(
    q_BHD: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One query a sequence, on its last key, so that nothing lies to its right: [B, H, D], [B, H].

    Explicit products, because one query a sequence makes the scores small, the fused op slower
    and its handling of NaN wrong on a CPU.
    """
    (B, H, D), (K, N) = q_BHD.shape, k_pages.shape[1:3]
    last_B1 = lengths[:, None].long() - 1
    page = torch.arange(int(last_B1.amax()) // N + 1, device=q_BHD.device)
    page_ids = page_table.gather(1, page.minimum(last_B1 // N)).long()  # past its last page: that
    key = torch.arange(len(page) * N, device=q_BHD.device)
    dead_B11S = (key > last_B1)[:, None, None]
    if left >= 0:
        dead_B11S = dead_B11S | (key < last_B1 - left)[:, None, None]

    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    q_BKGD = (q_BHD.to(wide) * scale).view(B, K, H // K, D)
    k_BKSD = _gather(k_pages, page_ids).to(wide)
    scores_BKGS = (q_BKGD @ k_BKSD.mT).masked_fill(dead_B11S, -torch.inf)
    v_BKSD = _gather(v_pages, page_ids).to(wide)
    weight_BKGS = scores_BKGS.softmax(dim=-1)
    out_BKGD = weight_BKGS @ v_BKSD
    if not torch.isfinite(out_BKGD.sum()):  # perhaps 0 · NaN from a slot that nobody may read
        out_BKGD = weight_BKGS @ v_BKSD.where(~dead_B11S.mT, 0)
    lse_BKG = scores_BKGS.logsumexp(dim=-1)
    return out_BKGD.reshape(B, H, D).to(q_BHD.dtype), lse_BKG.reshape(B, H).float()


def _gather(pages_PKND: Tensor, page_ids_BM: Tensor) -> Tensor:
    """The pages of each sequence in its order, [B, K, M · N, D]."""
    (B, M), (P, K, N, D) = page_ids_BM.shape, pages_PKND.shape
    head_K1 = torch.arange(K, device=pages_PKND.device)[:, None]
    if pages_PKND.is_contiguous():  # whole (page, head) blocks, several times as fast
        rows = (page_ids_BM[:, None] * K + head_K1).flatten()
        return pages_PKND.view(P * K, N * D).index_select(0, rows).view(B, K, M * N, D)
    return pages_PKND[page_ids_BM[:, None], head_K1].reshape(B, K, M * N, D)
