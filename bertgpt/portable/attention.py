"""Attention on torch's scaled_dot_product_attention: padded at once, packed by length buckets.

What that function cannot give (log-sum-exp, the defined dropout bits, NaN kept in its row on a CPU)
goes to the definition in `bertgpt.reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bertgpt import reference


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
    if return_lse or dropout_p > 0.0 or _sdpa_would_hide_nan(q, k, v):
        return reference.attention(
            q, k, v, mask=mask, key_lengths=key_lengths, causal=causal, window=window, scale=scale,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dropout_p=dropout_p, seed=seed,
            return_lse=return_lse,
        )  # fmt: skip
    rule = _Rule(causal, *(window or (-1, -1)), scale)
    dtype = q.dtype
    if q.device.type == "cpu":  # float32 is as fast there, and rounds once instead of thrice
        q, k, v = (_widened(t) for t in (q, k, v))
    if cu_seqlens_q is None:
        return _padded(q, k, v, rule, mask=mask, lengths_k=key_lengths).to(dtype)
    return _packed(q, k, v, rule, cu_seqlens_q, cu_seqlens_k).to(dtype)


@dataclass(frozen=True)
class _Rule:
    """Which keys a query may see by position, and the scale of its scores."""

    causal: bool
    left: int
    right: int
    scale: float | None

    def allowed(self, corner: Tensor, key: Tensor) -> Tensor:
        """Whether the query whose corner (its place among the keys) is given sees `key`."""
        allowed = torch.ones_like(key, dtype=torch.bool)
        if self.causal or self.right >= 0:
            allowed = allowed & (key <= corner + (0 if self.causal else self.right))
        if self.left >= 0:
            allowed = allowed & (key >= corner - self.left)
        return allowed


def _sdpa_would_hide_nan(*tensors: Tensor) -> bool:
    """On a CPU, SDPA turns a NaN query into 0; a sum finds NaN (and Inf) in one cheap pass."""
    if tensors[0].device.type != "cpu":
        return False
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return not math.isfinite(sum(float(t.detach().sum(dtype=wide)) for t in tensors))


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _Rule,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Attention within each packed sequence, all sequences of one length in one call.

    Nothing is padded, so nothing needs a mask, and where a bucket's sequences lie side by side
    (one alone always does) its rows are a view. Padding like lengths together would save calls,
    but needs a mask and a gather for each bucket.
    """
    starts_q = cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    buckets: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for sq, eq, sk, ek in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        if eq > sq:
            begins_q, begins_k = buckets.setdefault((eq - sq, ek - sk), ([], []))
            begins_q.append(sq)
            begins_k.append(sk)
    outs, rows = [], []
    for (length_q, length_k), (begins_q, begins_k) in buckets.items():
        q_BLHD = _take(q, begins_q, length_q)
        k_BSKD, v_BSKD = (_take(t, begins_k, length_k) for t in (k, v))
        outs.append(_padded(q_BLHD, k_BSKD, v_BSKD, rule).flatten(0, 1))
        rows.append(_rows(begins_q, length_q, q.device))
    if len(outs) == 1:  # all of q, in its own order
        return outs[0]
    out = q.new_zeros(q.shape)
    return out.index_copy_(0, torch.cat(rows), torch.cat(outs)) if outs else out


def _take(t: Tensor, begins: list[int], length: int) -> Tensor:
    """Rows [n, length, H, D] of n sequences; a view where they lie side by side."""
    n, first = len(begins), begins[0]
    if begins[-1] - first == (n - 1) * length:
        return t[first : first + n * length].unflatten(0, (n, length))
    return t.index_select(0, _rows(begins, length, t.device)).unflatten(0, (n, length))


def _rows(begins: list[int], length: int, device: torch.device) -> Tensor:
    """Row indices of sequences of one length, end to end."""
    begins_B1 = torch.tensor(begins, device=device)[:, None]
    return (begins_B1 + torch.arange(length, device=device)).flatten()


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
    allowed = _allowed(rule, L, S, mask, lengths_k, q.device)
    return _masked(q, k, v, allowed, mask, rule.scale).transpose(1, 2)


def _allowed(
    rule: _Rule,
    L: int,
    S: int,
    mask: Tensor | None,
    lengths_k: Tensor | None,
    device: torch.device,
) -> Tensor:
    """All that rules keys out together, as a boolean broadcastable to [B, H, L, S]."""
    key = torch.arange(S, device=device)
    corner = torch.arange(L, device=device)[:, None] + (S - L)
    allowed = rule.allowed(corner, key)
    if lengths_k is not None:
        allowed = allowed & (key < lengths_k[:, None, None, None])
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    return allowed


def _masked(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """SDPA under a mask, [B, H, L, D]: unseen keys may hold anything, unseeing queries give 0."""
    if q.device.type != "cpu":  # a CPU's inputs are finite here, `_sdpa_would_hide_nan` saw to it
        seen = allowed.any(dim=-2)[..., None]
        k, v = k.where(seen, 0), v.where(seen, 0)
    dtype, bias = q.dtype, allowed
    if mask is not None and mask.dtype != torch.bool:
        # A half cannot hold every finite bias: −1e9 would become −inf and rule the key out.
        q, k, v = (_widened(t) for t in (q, k, v))
        bias = mask.to(q.dtype).masked_fill(~allowed, -torch.inf)
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.where(allowed.any(dim=-1, keepdim=True), 0).to(dtype)


def _widened(t: Tensor) -> Tensor:
    """A half as float32, anything wider as it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
