"""Packed sequences by length: those of one length go through one call, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)
_WEIGHTS = 2**22  # of more than one sequence, where several matrices of them are formed


class Bucket(NamedTuple):
    """Sequences with as many queries and keys each.

    Attributes:
        numbers: their places in the batch.
        begins_q: their first queries.
        length_q: L, not 0.
        begins_k: their first keys.
        length_k: S.
    """

    numbers: list[int]
    begins_q: list[int]
    length_q: int
    begins_k: list[int]
    length_k: int


def by_length(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[list[int], int, list[int], int]]:
    """Sequences with as many queries and keys each: first queries, L, first keys, S."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    buckets: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for sq, eq, sk, ek in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        if eq > sq:
            begins_q, begins_k = buckets.setdefault((eq - sq, ek - sk), ([], []))
            begins_q.append(sq)
            begins_k.append(sk)
    for (length_q, length_k), (begins_q, begins_k) in buckets.items():
        yield begins_q, length_q, begins_k, length_k


def take_rows(t: Tensor, begins: list[int], length: int) -> Tensor:
    """Rows [n, length, H, D] of n sequences; a view where they lie side by side."""
    n, first = len(begins), begins[0]
    if begins[-1] - first == (n - 1) * length:
        return t[first : first + n * length].unflatten(0, (n, length))
    return t.index_select(0, row_indices(begins, length, t.device)).unflatten(0, (n, length))


def row_indices(begins: list[int], length: int, device: torch.device) -> Tensor:
    """Row indices of sequences of one length, end to end."""
    begins_B1 = torch.tensor(begins, device=device)[:, None]
    return (begins_B1 + torch.arange(length, device=device)).flatten()


def widened(t: Tensor) -> Tensor:
    """A half as float32, anything wider as it is."""
    return t if t.dtype in _WIDE else t.float()


def plain_buckets(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
) -> list[Bucket] | None:
    """A call's sequences on a CPU, padded ones too, where every query has keys by causality alone.

    Args:
        q: `[T, H, D]` or `[B, L, H, D]`.
        k: Like q.
        mask: As in `bertgpt.ops.attention`, and so the rest.
        key_lengths: Likewise.
        causal: Likewise.
        window: Likewise.
        scale: Likewise.
        cu_seqlens_q: Likewise.
        cu_seqlens_k: Likewise.
        dropout_p: Likewise; under dropout a bucket has fewer sequences.

    Returns:
        None on other devices, under masks, key lengths and windows, with a scale that is not
        positive, where there is nothing to attend, and where causality rules out a corner.
    """
    if not q.is_cpu or mask is not None or key_lengths is not None or max(window or (-1,)) >= 0:
        return None
    if scale <= 0.0 or 0 in (*q.shape, *k.shape):
        return None
    if cu_seqlens_q is None:
        starts_q, starts_k = (torch.arange(len(t) + 1) * t.shape[1] for t in (q, k))
    else:
        starts_q = cu_seqlens_q
        starts_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    pairs = enumerate(pairwise(starts_q.tolist()))
    number = {start: b for b, (start, end) in pairs if end > start}
    made = []
    for begins_q, length_q, begins_k, length_k in by_length(starts_q, starts_k):
        if causal and length_q != length_k:
            return None
        count = len(begins_q)
        if dropout_p > 0.0:
            count = max(1, _WEIGHTS // max(1, q.shape[-2] * length_q * length_k))
        for first in range(0, len(begins_q), count):
            some_q, some_k = (begins[first : first + count] for begins in (begins_q, begins_k))
            numbers = [number[begin] for begin in some_q]
            made.append(Bucket(numbers, some_q, length_q, some_k, length_k))
    return made


def heads_first(t: Tensor, begins: list[int], length: int, groups: int = 1) -> Tensor:
    """Rows of n sequences as `[n, groups · H, length, D]`, float32 at least, each head repeated."""
    heads = widened(take_rows(t, begins, length)).transpose(1, 2)
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
