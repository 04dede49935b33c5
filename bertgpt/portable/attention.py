"""Attention on torch's scaled_dot_product_attention: padded at once, packed by length buckets.

What that function cannot give (the defined dropout bits, NaN kept in its row on a CPU) goes to
`attention_dropout.py` or, with masks, windows or NaN, to the definition in `bertgpt.reference`. The
log-sum-exp is a pass of its own, so that asking for it changes nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bertgpt import reference
from bertgpt.portable.attention_dropout import dropped_attention
from bertgpt.portable.length_buckets import (
    by_length,
    plain_buckets,
    row_indices,
    take_rows,
    widened,
)
from bertgpt.portable.products import is_finite

_LSE_SCORES = 2**20  # scores that the log-sum-exp pass holds at once: 4 MiB in float32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `bertgpt.ops.attention` computes; the arguments are described there."""
    rule = _Rule(causal, *(window or (-1, -1)), q.shape[-1] ** -0.5 if scale is None else scale)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    masks: dict[str, Any] = {
        "mask": mask, "key_lengths": key_lengths, "causal": causal, "window": window,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "dropout_p": dropout_p,
    }  # fmt: skip
    out: Any = None
    if not sdpa_would_hide_nan(q, k, v):
        if dropout_p == 0.0:
            out = _attend(q, k, v, rule, mask, key_lengths, cu_seqlens_q, cu_seqlens_k)
        elif seed is not None:
            out = _dropped(q, k, v, rule.scale, seed, masks)
    if out is None:
        out = reference.attention(q, k, v, scale=scale, seed=seed, **masks)
    if not return_lse:
        return out
    with torch.no_grad():
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return out, _lse(q, k, rule, mask=mask, lengths_k=key_lengths)
        return out, _lse_packed(q, k, rule, cu_seqlens_q, cu_seqlens_k)


def _dropped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seed: int | Tensor, masks: dict[str, Any]
) -> Tensor | None:
    """The output under dropout; None where the definition is called for, overflows among them."""
    buckets = plain_buckets(q, k, scale=scale, **masks)
    if buckets is None:
        return None
    causal, dropout_p = masks["causal"], masks["dropout_p"]
    out = dropped_attention(
        q, k, v, buckets, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed
    )
    return out if is_finite(out) else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _Rule,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """The output by SDPA, in q's dtype."""
    dtype = q.dtype
    if q.device.type == "cpu":  # float32 is as fast there, and rounds once instead of thrice
        q, k, v = (widened(t) for t in (q, k, v))
    if rule.scale <= 0.0:  # SDPA scales after it has set what causality rules out to −inf
        sign = 0.0 if rule.scale == 0.0 else -1.0
        q, rule = q * sign, replace(rule, scale=-rule.scale or 1.0)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _padded(q, k, v, rule, mask=mask, lengths_k=key_lengths).to(dtype)
    return _packed(q, k, v, rule, cu_seqlens_q, cu_seqlens_k).to(dtype)


@dataclass(frozen=True)
class _Rule:
    """Which keys a query may see by position, and the scale of its scores."""

    causal: bool
    left: int
    right: int
    scale: float

    def allowed(self, corner: Tensor, key: Tensor) -> Tensor:
        """Whether the query whose corner (its place among the keys) is given sees `key`."""
        allowed = torch.ones_like(key, dtype=torch.bool)
        if self.causal or self.right >= 0:
            allowed = allowed & (key <= corner + (0 if self.causal else self.right))
        if self.left >= 0:
            allowed = allowed & (key >= corner - self.left)
        return allowed


def sdpa_would_hide_nan(*tensors: Tensor) -> bool:
    """On a CPU, SDPA turns a NaN query into 0; a sum finds NaN (and Inf) in one cheap pass."""
    if tensors[0].device.type != "cpu":
        return False
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return not math.isfinite(sum(float(t.detach().sum(dtype=wide)) for t in tensors))


def _packed(
    q: Tensor, k: Tensor, v: Tensor, rule: _Rule, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Attention within each packed sequence, all sequences of one length in one call.

    Nothing is padded, so nothing needs a mask, and where a bucket's sequences lie side by side
    (one alone always does) its rows are a view. Padding like lengths together would save calls,
    but needs a mask and a gather for each bucket.
    """
    outs, rows = [], []
    for begins_q, length_q, begins_k, length_k in by_length(cu_seqlens_q, cu_seqlens_k):
        q_BLHD = take_rows(q, begins_q, length_q)
        k_BSKD, v_BSKD = (take_rows(t, begins_k, length_k) for t in (k, v))
        outs.append(_padded(q_BLHD, k_BSKD, v_BSKD, rule).flatten(0, 1))
        rows.append(row_indices(begins_q, length_q, q.device))
    if len(outs) == 1:  # all of q, in its own order
        return outs[0]
    out = q.new_zeros(q.shape)
    return out.index_copy_(0, torch.cat(rows), torch.cat(outs)) if outs else out


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _Rule,
    *,
    mask: Tensor | None = None,
    lengths_k: Tensor | None = None,
) -> Tensor:
    """One SDPA call over q [B, L, H, D], k and v [B, S, K, D]."""
    L, S = q.shape[1], k.shape[1]
    if 0 in q.shape or S == 0:
        return torch.zeros_like(q)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    whole = mask is None and lengths_k is None
    if whole and rule.left < 0 and rule.right < 0 and (not rule.causal or L == S):
        out = scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=rule.scale)
        return out.transpose(1, 2)
    allowed = _allowed(rule, slice(None), L, S, mask, lengths_k, q.device)
    return _masked(q, k, v, allowed, mask, rule.scale).transpose(1, 2)


def _allowed(
    rule: _Rule,
    rows: slice,
    L: int,
    S: int,
    mask: Tensor | None,
    lengths_k: Tensor | None,
    device: torch.device,
) -> Tensor:
    """All that rules keys out together for these queries, broadcastable to [B, H, rows, S]."""
    key = torch.arange(S, device=device)
    corner = torch.arange(L, device=device)[rows, None] + (S - L)
    allowed = rule.allowed(corner, key)
    if lengths_k is not None:
        allowed = allowed & (key < lengths_k[:, None, None, None])
    if mask is not None:
        mask = mask[:, :, rows]
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    return allowed


def _masked(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SDPA under a mask, [B, H, L, D]: unseen keys may hold anything, unseeing queries give 0."""
    if q.device.type != "cpu":  # a CPU's inputs are finite here, `sdpa_would_hide_nan` saw to it
        seen = allowed.any(dim=-2)[..., None]
        k, v = k.where(seen, 0), v.where(seen, 0)
    dtype, bias = q.dtype, allowed
    if mask is not None and mask.dtype != torch.bool:
        # A half cannot hold every finite bias: −1e9 would become −inf and rule the key out.
        q, k, v = (widened(t) for t in (q, k, v))
        bias = mask.to(q.dtype).masked_fill(~allowed, -torch.inf)
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.where(allowed.any(dim=-1, keepdim=True), 0).to(dtype)


def _lse(
    q: Tensor,
    k: Tensor,
    rule: _Rule,
    *,
    mask: Tensor | None = None,
    lengths_k: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of the scores, float32 [B, H, L], from products in float32 or wider.

    A few rows of queries at a time: the scores of all would be [B, H, L, S].
    """
    (B, L, H, _), (S, K) = q.shape, k.shape[1:3]
    lse_BHL = q.new_full((B, H, L), -torch.inf, dtype=torch.float32)
    if 0 in lse_BHL.shape or S == 0:
        return lse_BHL
    q_XGLD = widened(q).mul(rule.scale).transpose(1, 2).reshape(B * K, H // K, L, -1)
    k_XDS = widened(k).permute(0, 2, 3, 1).flatten(0, 1).contiguous()  # X is B · K
    step = max(1, _LSE_SCORES // (B * H * S))
    for first in range(0, L, step):
        rows = slice(first, first + step)
        scores = (q_XGLD[:, :, rows].flatten(1, 2) @ k_XDS).view(B, H, -1, S)
        if mask is not None and mask.dtype != torch.bool:
            scores += mask[:, :, rows]
        allowed = _allowed(rule, rows, L, S, mask, lengths_k, q.device)
        lse_BHL[..., rows] = scores.masked_fill_(~allowed, -torch.inf).logsumexp(dim=-1)
    return lse_BHL


def _lse_packed(
    q: Tensor, k: Tensor, rule: _Rule, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """The same within each packed sequence, float32 [H, T]."""
    lse_HT = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    for begins_q, length_q, begins_k, length_k in by_length(cu_seqlens_q, cu_seqlens_k):
        bucket = _lse(take_rows(q, begins_q, length_q), take_rows(k, begins_k, length_k), rule)
        lse_HT[:, row_indices(begins_q, length_q, q.device)] = bucket.transpose(0, 1).flatten(1)
    return lse_HT
