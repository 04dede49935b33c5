"""Paged attention on torch's own ops: decoding page by page, chunks as packed attention.

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

# Pages from the first to the last in use are read where they lie, if so many of them are in use.
_DENSITY = 0.5


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
        plan = _plan(page_table, lengths, k_pages, left)
        out_BHD, scores_BHS = _decode(q, k_pages, v_pages, plan, scale)
    if not return_lse:
        return out_BHD
    return out_BHD, scores_BHS.logsumexp(dim=-1).float().t().contiguous()


def _pack(pages_PKND: Tensor, page_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence's tokens after one another, [T', K, D], and where each starts, [B + 1]."""
    page_size = pages_PKND.shape[2]
    starts = torch.tensor([0, *itertools.accumulate(lengths.tolist())], device=lengths.device)
    sequence = torch.repeat_interleave(lengths.long())
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence]
    page_ids = page_table[sequence, position // page_size].long()
    return pages_PKND[page_ids, :, position % page_size], starts


@dataclass(frozen=True)
class _Plan:
    """Which pages one decoding step of a batch reads, and whose they are.

    Every sequence has M places for its pages' scores.

    Attributes:
        pages: Those that are read, P of them: from one to another, or by number.
        owner_P: Each one's sequence; of pages that only come along, any.
        place_P: Its place in B · M; likewise.
        used_U: Which of them are in use, in the order of their places. So sums come out the same
            wherever pages lie.
        place_U: Their places.
        dead_BMN: True at keys that the sequence's query does not see.
    """

    pages: slice | Tensor
    owner_P: Tensor
    place_P: Tensor
    used_U: Tensor
    place_U: Tensor
    dead_BMN: Tensor

    def read(self, pages_PKND: Tensor, dtype: torch.dtype) -> Tensor:
        """The planned pages' heads, [P · K, N, D]."""
        if isinstance(self.pages, slice):
            chosen = pages_PKND[self.pages]
        else:
            chosen = pages_PKND.index_select(0, self.pages)
        return chosen.to(dtype).reshape(-1, *pages_PKND.shape[2:])


def _plan(page_table: Tensor, lengths: Tensor, k_pages: Tensor, left: int) -> _Plan:
    """The plan of a batch; every layer of a step asks for the same, so the last are kept."""
    N, counts = k_pages.shape[2], tuple(lengths.tolist())
    used = page_table[:, : -(-max(counts, default=0) // N)].tolist()
    return _planned(counts, tuple(map(tuple, used)), N, left, k_pages.device)


@lru_cache(maxsize=4)
def _planned(
    lengths: tuple[int, ...],
    table: tuple[tuple[int, ...], ...],
    N: int,
    left: int,
    device: torch.device,
) -> _Plan:
    """By values alone, so that what is kept cannot go stale when a table changes in place."""
    B, M = len(lengths), max((-(-n // N) for n in lengths), default=0)
    found = []  # page, owner and place, in the order of places
    for b, n in enumerate(lengths):
        first = max(n - 1 - left, 0) // N if left >= 0 else 0
        found += [(table[b][m], b, b * M + m) for m in range(first, -(-n // N))]
    numbers = [page for page, _, _ in found]
    start, stop = min(numbers, default=0), max(numbers, default=-1) + 1
    pages: slice | Tensor = slice(start, stop)
    used = [page - start for page in numbers]
    if len(set(numbers)) < len(numbers) or len(numbers) < _DENSITY * (stop - start):
        pages, used = torch.tensor(numbers, device=device), list(range(len(numbers)))
    whose = [(0, 0)] * (stop - start if isinstance(pages, slice) else len(used))
    for at, (_, b, place) in zip(used, found, strict=True):
        whose[at] = (b, place)
    owner_P, place_P = torch.tensor(whose, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    key_S = torch.arange(M * N, device=device)
    last_B1 = torch.tensor(lengths, dtype=torch.int64, device=device)[:, None] - 1
    dead_BS = key_S > last_B1
    if left >= 0:
        dead_BS |= key_S < last_B1 - left
    used_U = torch.tensor(used, dtype=torch.int64, device=device)
    return _Plan(pages, owner_P, place_P, used_U, place_P[used_U], dead_BS.view(B, M, N))


def _decode(
    q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, plan: _Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """One query a sequence, on its last key, so that nothing lies to its right.

    Each page meets its own sequence's query, where it lies: keys and values are read once and not
    copied. What goes between pages and sequences are scores and sums.

    Returns:
        out [B, H, D] and the scores [B, H, S], −inf where a key is not seen.
    """
    (B, H, D), K, (_, M, N) = q_BHD.shape, k_pages.shape[1], plan.dead_BMN.shape
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    q_PHD = (q_BHD.to(wide) * scale).index_select(0, plan.owner_P)
    scores_PHN = (q_PHD.view(-1, H // K, D) @ plan.read(k_pages, wide).mT).view(-1, H, N)
    scores_BMHN = q_PHD.new_full((B, M, H, N), -torch.inf)
    scores_BMHN.view(-1, H, N).index_copy_(0, plan.place_U, scores_PHN.index_select(0, plan.used_U))
    scores_BMHN.masked_fill_(plan.dead_BMN[:, :, None], -torch.inf)
    scores_BHS = scores_BMHN.transpose(1, 2).reshape(B, H, M * N)
    weights_BMHN = scores_BHS.softmax(dim=-1).view(B, H, M, N).transpose(1, 2)
    weights_PGN = weights_BMHN.reshape(-1, H, N).index_select(0, plan.place_P).view(-1, H // K, N)

    def mix(v_PND: Tensor) -> Tensor:
        out_UHD = (weights_PGN @ v_PND).view(-1, H, D).index_select(0, plan.used_U)
        placed = out_UHD.new_zeros(B * M, H, D).index_copy_(0, plan.place_U, out_UHD)
        return placed.view(B, M, H, D).sum(1)  # not index_add_, whose order varies on a GPU

    v_PND = plan.read(v_pages, wide)
    out_BHD = mix(v_PND)
    if not math.isfinite(out_BHD.sum()):  # perhaps 0 · NaN from a slot that nobody may read
        dead_PN = plan.dead_BMN.view(-1, N)[plan.place_P].repeat_interleave(K, 0)
        out_BHD = mix(v_PND.masked_fill(dead_PN[..., None], 0))
    return out_BHD.to(q_BHD.dtype), scores_BHS
