"""Gradients of attention on a CPU: by torch's flash kernel, or by the definition under dropout.

Packed sequences go in the forward pass's buckets of one length, and each gradient is written once,
where autograd through the buckets would fill a tensor of zeros for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from bertgpt.philox import keep_attention
from bertgpt.portable.attention import _buckets, _rows, _sdpa_would_hide_nan, _take, _widened

_WEIGHTS = 2**22  # weights of a call under dropout, where several matrices of them are formed

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> dict[str, Tensor] | None:
    """Gradients of q, k and v; None where the forward pass takes another way than plain SDPA.

    That is: another device, masks, key lengths, windows, NaN, a scale that is not positive, and
    causality where there are not as many keys as queries.
    """
    if q.device.type != "cpu" or mask is not None or key_lengths is not None or window != (-1, -1):
        return None
    if scale <= 0.0 or 0 in (*q.shape, *k.shape) or _sdpa_would_hide_nan(q, k, v, grad):
        return None
    buckets = list(_sequences(q, k, cu_seqlens_q, cu_seqlens_k, split=dropout_p > 0.0))
    if causal and any(length_q != length_k for _, _, length_q, _, length_k in buckets):
        return None
    tensors = [t if t.dim() == 3 else t.flatten(0, 1) for t in (q, k, v, grad)]
    made = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors[:3]]
    for numbers, begins_q, length_q, begins_k, length_k in buckets:
        if length_k == 0:
            continue
        places = (begins_q, length_q), (begins_k, length_k), (begins_k, length_k)
        q_n, k_n, v_n = (_heads(t, *p) for t, p in zip(tensors[:3], places, strict=True))
        grad_n = _heads(tensors[3], begins_q, length_q)
        groups = q_n.shape[1] // k_n.shape[1]
        k_n, v_n = (t.repeat_interleave(groups, dim=1) for t in (k_n, v_n))
        if dropout_p > 0.0:
            keep = _keep(seed, dropout_p, numbers, q_n.shape[1], length_q, length_k)
            parts = _dropped(grad_n, q_n, k_n, v_n, causal, scale, keep, dropout_p)
        else:
            out, lse = _flash(q_n, k_n, v_n, 0.0, causal, scale=scale)
            parts = _flash_backward(grad_n, q_n, k_n, v_n, out, lse, 0.0, causal, scale=scale)
        for into, part, (begins, length) in zip(made, parts, places, strict=True):
            if part.shape[1] != into.shape[1]:
                part = part.unflatten(1, (-1, groups)).sum(2)
            part = part.transpose(1, 2).flatten(0, 1).to(into.dtype)
            into.index_copy_(0, _rows(begins, length, into.device), part)
    return {n: m.view(t.shape) for n, m, t in zip("qkv", made, (q, k, v), strict=True)}


def _sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, split: bool
) -> Iterator[tuple[list[int], list[int], int, list[int], int]]:
    """Sequences of one length: their numbers, first queries, L, first keys, S.

    `split` keeps their weights together below a limit, a single sequence's aside.
    """
    if cu_seqlens_q is None:
        starts_q, starts_k = (torch.arange(len(t) + 1) * t.shape[1] for t in (q, k))
    else:
        starts_q = cu_seqlens_q
        starts_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    pairs = enumerate(pairwise(starts_q.tolist()))
    number = {start: b for b, (start, end) in pairs if end > start}
    for begins_q, length_q, begins_k, length_k in _buckets(starts_q, starts_k):
        count = len(begins_q)
        if split:
            count = max(1, _WEIGHTS // max(1, q.shape[-2] * length_q * length_k))
        for first in range(0, len(begins_q), count):
            some_q, some_k = (begins[first : first + count] for begins in (begins_q, begins_k))
            yield [number[b] for b in some_q], some_q, length_q, some_k, length_k


def _heads(t: Tensor, begins: list[int], length: int) -> Tensor:
    """Rows of n sequences as [n, H, length, D], float32 at least."""
    return _widened(_take(t, begins, length)).transpose(1, 2)


def _keep(
    seed: int | Tensor | None, p: float, numbers: list[int], heads: int, queries: int, keys: int
) -> Tensor:
    """Which weights of these sequences are kept, [n, H, L, S]."""
    assert seed is not None
    places = torch.tensor(numbers)[:, None] * heads + torch.arange(heads)
    kept = keep_attention(seed, p, places.flatten(), queries, keys)
    return kept.view(len(numbers), heads, queries, keys)


def _dropped(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    keep: Tensor,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, [n, H, L, D], of (softmax(scale · q kᵀ) · keep / (1 − p)) v."""
    scores = (q @ k.mT).mul_(scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    weights = scores.softmax(-1)
    kept = keep.to(q.dtype) * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
    grad_v = (weights * kept).mT @ grad
    slope = (grad @ v.mT).mul_(kept)
    slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
    return slope @ k, slope.mT @ q, grad_v
