"""Attention under dropout on a CPU, (softmax(scale · q kᵀ) · keep / (1 − p)) v, and its gradient.

By the definition, since torch's fused kernels draw other bits; a few sequences of one length at a
time, since several matrices of their weights are formed. Scores that overflow give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bertgpt.philox import keep_attention
from bertgpt.portable.length_buckets import Bucket, heads_first, row_indices


def dropped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buckets: Sequence[Bucket],
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: int | Tensor,
) -> Tensor:
    """The output, like q: packed, or padded with every place a token, finite, in `buckets`."""
    q_THD, k_SKD, v_SKD = (t if t.dim() == 3 else t.flatten(0, 1) for t in (q, k, v))
    groups = q_THD.shape[1] // k_SKD.shape[1]
    out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
    for bucket in buckets:
        if bucket.length_k == 0:
            continue
        q_nHLD = heads_first(q_THD, bucket.begins_q, bucket.length_q)
        k_nHSD, v_nHSD = (
            heads_first(t, bucket.begins_k, bucket.length_k, groups) for t in (k_SKD, v_SKD)
        )
        weights = _weights(q_nHLD, k_nHSD, causal, scale)
        kept = weights * keep_scale(seed, dropout_p, bucket, q_nHLD)
        rows_RHD = (kept @ v_nHSD).transpose(1, 2).flatten(0, 1).to(out_THD.dtype)
        out_THD.index_copy_(0, row_indices(bucket.begins_q, bucket.length_q, q.device), rows_RHD)
    return out_THD.view(q.shape)


def dropped_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, `[n, H, L, D]`, for one bucket and its `keep_scale`."""
    weights = _weights(q, k, causal, scale)
    grad_v = (weights * keep).mT @ grad
    slope = (grad @ v.mT).mul_(keep)
    slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
    return slope @ k, slope.mT @ q, grad_v


def keep_scale(seed: int | Tensor, p: float, bucket: Bucket, like: Tensor) -> Tensor:
    """1 / (1 − p) where a weight of these sequences is kept, else 0: `[n, H, L, S]`.

    In the dtype of `like` `[n, H, …]`.
    """
    heads = like.shape[1]
    places = torch.tensor(bucket.numbers)[:, None] * heads + torch.arange(heads)
    keep = keep_attention(seed, p, places.flatten(), bucket.length_q, bucket.length_k)
    return keep.view(len(places), heads, *keep.shape[1:]) * like.new_tensor(
        0.0 if p == 1.0 else 1.0 / (1.0 - p)
    )


def _weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.mT).mul_(scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores.masked_fill_(later, -torch.inf)
    return scores.softmax(-1)
