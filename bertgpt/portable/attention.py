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

MIN_DENSITY = 0.8  # a bucket may compute at most a quarter more scores' rows than it has tokens


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


@dataclass(frozen=True)
class _Sequence:
    """One packed sequence: where its queries and keys start, and how many there are."""

    start_q: int
    length_q: int
    start_k: int
    length_k: int


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
    """Attention within each packed sequence, a bucket of like lengths at a time."""
    starts_q = cu_seqlens_q.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    sequences = [
        _Sequence(sq, eq - sq, sk, ek - sk)
        for sq, eq, sk, ek in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        if eq > sq
    ]
    buckets = _buckets(sequences)
    if len(buckets) == 1 and _is_a_view(buckets[0], q, k):
        n = len(buckets[0])
        q_BLHD, k_BSKD, v_BSKD = (t.unflatten(0, (n, -1)) for t in (q, k, v))
        return _padded(q_BLHD, k_BSKD, v_BSKD, rule).flatten(0, 1)
    order, outs = [], []
    for bucket in buckets:
        rows, out = _bucket(q, k, v, bucket, rule)
        order.append(rows)
        outs.append(out)
    if not outs:
        return torch.zeros_like(q)
    return torch.cat(outs).index_select(0, torch.cat(order).argsort())


def _buckets(sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """Sequences of like length together, so that padding a bucket wastes little."""
    buckets: list[list[_Sequence]] = []
    tokens = 0
    for sequence in sorted(sequences, key=lambda s: (s.length_q, s.length_k), reverse=True):
        first = buckets[-1][0] if buckets else sequence
        tokens += sequence.length_q
        dense = bool(buckets) and tokens >= MIN_DENSITY * first.length_q * (len(buckets[-1]) + 1)
        if dense and MIN_DENSITY * first.length_k <= sequence.length_k <= first.length_k:
            buckets[-1].append(sequence)
        else:
            buckets.append([sequence])
            tokens = sequence.length_q
    return buckets


def _is_a_view(bucket: list[_Sequence], q: Tensor, k: Tensor) -> bool:
    """Whether the bucket is all of q and k, in equal lengths: then a reshape is enough."""
    first, n = bucket[0], len(bucket)
    alike = all(s.length_q == first.length_q and s.length_k == first.length_k for s in bucket)
    return alike and n * first.length_q == q.shape[0] and n * first.length_k == k.shape[0]


def _bucket(
    q: Tensor, k: Tensor, v: Tensor, bucket: list[_Sequence], rule: _Rule
) -> tuple[Tensor, Tensor]:
    """Attention of one bucket: the rows of q that it covers, and their outputs [rows, H, D]."""
    index_q, lengths_q = _gather_index([(s.start_q, s.length_q) for s in bucket], q.device)
    index_k, lengths_k = _gather_index([(s.start_k, s.length_k) for s in bucket], q.device)
    q_BLHD, k_BSKD, v_BSKD = q[index_q], k[index_k], v[index_k]
    ragged = int(lengths_k.amin()) < index_k.shape[1] or int(lengths_q.amin()) < index_q.shape[1]
    lengths = (lengths_q, lengths_k) if ragged else (None, None)
    out_BLHD = _padded(q_BLHD, k_BSKD, v_BSKD, rule, lengths_q=lengths[0], lengths_k=lengths[1])
    if not ragged:
        return index_q.flatten(), out_BLHD.flatten(0, 1)
    real = torch.arange(index_q.shape[1], device=q.device) < lengths_q[:, None]
    return index_q[real], out_BLHD[real]


def _gather_index(spans: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row indices [B, longest] of (start, length) spans, clamped into each span; the lengths."""
    start_B, length_B = torch.tensor(spans, device=device).unbind(1)
    place = torch.arange(max(length for _, length in spans), device=device)
    last_B1 = (length_B - 1).clamp(min=0)[:, None]
    return start_B[:, None] + place.minimum(last_B1), length_B


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _Rule,
    *,
    mask: Tensor | None = None,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
) -> Tensor:
    """One SDPA call over q [B, L, H, D], k and v [B, S, K, D].

    `lengths_q` is given when sequences are shorter than L: each has its own corner then.
    """
    L, S = q.shape[1], k.shape[1]
    if 0 in q.shape or S == 0:
        return torch.zeros_like(q)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    whole = mask is None and lengths_q is None and lengths_k is None
    if whole and rule.left < 0 and rule.right < 0 and (not rule.causal or L == S):
        out = scaled_dot_product_attention(q, k, v, is_causal=rule.causal, scale=rule.scale)
        return out.transpose(1, 2)
    allowed = _allowed(rule, L, S, mask, lengths_q, lengths_k, q.device)
    return _masked(q, k, v, allowed, mask, rule.scale).transpose(1, 2)


def _allowed(
    rule: _Rule,
    L: int,
    S: int,
    mask: Tensor | None,
    lengths_q: Tensor | None,
    lengths_k: Tensor | None,
    device: torch.device,
) -> Tensor:
    """All that rules keys out together, as a boolean broadcastable to [B, H, L, S]."""
    key = torch.arange(S, device=device)
    corner = torch.arange(L, device=device)[:, None] + (S - L)
    if lengths_q is not None and lengths_k is not None:
        corner = corner - (S - L) + (lengths_k - lengths_q)[:, None, None, None]
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
