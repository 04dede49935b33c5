"""Attention by its definition: softmax(scale · Q Kᵀ + mask) V, one score matrix at a time.

Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.philox import keep_attention


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
    """What `bertgpt.ops.attention` computes; the arguments are described there.

    Returns:
        out like q, and with `return_lse` the float32 log-sum-exp, [B, H, L] or [H, T].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = window or (-1, -1)
    if cu_seqlens_q is None:
        allowed, bias = _allowed_BHLS(q, k, mask, key_lengths, causal, left, right)
        keep = _keep_BHLS(q, k, 0, dropout_p, seed)
        out, lse = _attend(q, k, v, allowed, bias, scale, keep, dropout_p)
        return (out, lse) if return_lse else out

    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    outs, lses = [q[:0]], [q.new_empty((q.shape[1], 0), dtype=torch.float32)]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        q_1LHD = q[starts_q[b] : starts_q[b + 1]].unsqueeze(0)
        k_1SKD = k[starts_k[b] : starts_k[b + 1]].unsqueeze(0)
        v_1SKD = v[starts_k[b] : starts_k[b + 1]].unsqueeze(0)
        allowed, bias = _allowed_BHLS(q_1LHD, k_1SKD, None, None, causal, left, right)
        keep = _keep_BHLS(q_1LHD, k_1SKD, b, dropout_p, seed)
        out, lse = _attend(q_1LHD, k_1SKD, v_1SKD, allowed, bias, scale, keep, dropout_p)
        outs.append(out[0])
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)


def _allowed_BHLS(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor | None]:
    """Which query sees which key, and what is added to the scores of those it sees."""
    (B, L, H, _), S = q.shape, k.shape[1]
    key = torch.arange(S, device=q.device)
    corner = torch.arange(L, device=q.device)[:, None] + (S - L)  # the last sees the last
    allowed = torch.ones(B, H, L, S, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (key <= corner)
    if left >= 0:
        allowed = allowed & (key >= corner - left)
    if right >= 0:
        allowed = allowed & (key <= corner + right)
    if key_lengths is not None:
        allowed = allowed & (key < key_lengths[:, None, None, None])
    if mask is None or mask.dtype == torch.bool:
        return (allowed if mask is None else allowed & mask), None
    return allowed & (mask != -torch.inf), mask


def _keep_BHLS(
    q: Tensor, k: Tensor, first: int, dropout_p: float, seed: int | Tensor | None
) -> Tensor | None:
    """The dropout mask of sequences first … first + B − 1."""
    if dropout_p == 0.0 or seed is None:
        return None
    (B, L, H, _), S = q.shape, k.shape[1]
    heads = torch.arange(first * H, (first + B) * H, device=q.device)
    return keep_attention(seed, dropout_p, heads, L, S).view(B, H, L, S)


def _attend(
    q_BLHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    allowed_BHLS: Tensor,
    bias_BHLS: Tensor | None,
    scale: float,
    keep_BHLS: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention where `allowed`; zero and −inf for a query that sees no key."""
    H, groups = q_BLHD.shape[2], q_BLHD.shape[2] // k_BSKD.shape[2]
    if 0 in allowed_BHLS.shape:
        empty = q_BLHD.new_full((q_BLHD.shape[0], H, q_BLHD.shape[1]), -torch.inf)
        return torch.zeros_like(q_BLHD), empty.float()

    # A key that no query of this head sees may hold NaN: it is replaced, not multiplied by 0.
    seen_BHS1 = allowed_BHLS.any(dim=2)[..., None]
    k_BHSD = k_BSKD.repeat_interleave(groups, dim=2).transpose(1, 2).where(seen_BHS1, 0)
    v_BHSD = v_BSKD.repeat_interleave(groups, dim=2).transpose(1, 2).where(seen_BHS1, 0)

    wide = torch.promote_types(q_BLHD.dtype, torch.float32)
    scores_BHLS = (q_BLHD.transpose(1, 2) @ k_BHSD.mT).to(wide) * scale
    if bias_BHLS is not None:
        scores_BHLS = scores_BHLS + bias_BHLS.to(wide)
    scores_BHLS = scores_BHLS.masked_fill(~allowed_BHLS, -torch.inf)

    top_BHL1 = scores_BHLS.detach().amax(dim=-1, keepdim=True)
    top_BHL1 = top_BHL1.masked_fill(top_BHL1 == -torch.inf, 0.0)  # −inf − −inf would be NaN
    weight_BHLS = (scores_BHLS - top_BHL1).exp()
    total_BHL1 = weight_BHLS.sum(dim=-1, keepdim=True)
    lse_BHL = (top_BHL1 + total_BHL1.log()).squeeze(-1).detach().float()
    weight_BHLS = weight_BHLS / total_BHL1.masked_fill(total_BHL1 == 0.0, 1.0)
    if keep_BHLS is not None:
        kept = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        weight_BHLS = weight_BHLS.where(keep_BHLS, 0.0) * kept
    out_BHLD = weight_BHLS.to(v_BHSD.dtype) @ v_BHSD
    return out_BHLD.transpose(1, 2).contiguous(), lse_BHL
