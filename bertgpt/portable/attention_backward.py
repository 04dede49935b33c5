"""Gradients of attention on a CPU: by torch's flash kernel, or by the definition under dropout.

Packed sequences go in the forward pass's buckets of one length, and each gradient is written once,
where autograd through the buckets would fill a tensor of zeros for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.portable.attention import sdpa_would_hide_nan
from bertgpt.portable.attention_dropout import dropped_gradients, keep_scale
from bertgpt.portable.length_buckets import heads_first, plain_buckets, row_indices
from bertgpt.portable.products import is_finite

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

    That is: another device, masks, key lengths, windows, NaN, a scale that is not positive,
    causality where there are not as many keys as queries, and scores that overflow under dropout.
    """
    buckets = plain_buckets(
        q, k, mask=mask, key_lengths=key_lengths, causal=causal, window=window, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dropout_p=dropout_p,
    )  # fmt: skip
    if buckets is None or sdpa_would_hide_nan(q, k, v, grad):
        return None
    tensors = [t if t.dim() == 3 else t.flatten(0, 1) for t in (q, k, v, grad)]
    groups = q.shape[-2] // k.shape[-2]
    made = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors[:3]]
    for bucket in buckets:
        if bucket.length_k == 0:
            continue
        queries, keys = (bucket.begins_q, bucket.length_q), (bucket.begins_k, bucket.length_k)
        q_n, grad_n = (heads_first(t, *queries) for t in (tensors[0], tensors[3]))
        k_n, v_n = (heads_first(t, *keys, groups) for t in tensors[1:3])
        if dropout_p > 0.0:
            assert seed is not None
            keep = keep_scale(seed, dropout_p, bucket, q_n)
            parts = dropped_gradients(grad_n, q_n, k_n, v_n, causal, scale, keep)
        else:
            out, lse = _flash(q_n, k_n, v_n, 0.0, causal, scale=scale)
            parts = _flash_backward(grad_n, q_n, k_n, v_n, out, lse, 0.0, causal, scale=scale)
        for into, part, place in zip(made, parts, (queries, keys, keys), strict=True):
            if part.shape[1] != into.shape[1]:
                part = part.unflatten(1, (-1, groups)).sum(2)
            part = part.transpose(1, 2).flatten(0, 1).to(into.dtype)
            into.index_copy_(0, row_indices(*place, into.device), part)
    if dropout_p > 0.0 and not all(map(is_finite, made)):  # scores have overflowed
        return None
    return {n: m.view(t.shape) for n, m, t in zip("qkv", made, (q, k, v), strict=True)}
