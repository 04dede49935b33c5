"""Paged attention by its definition: gather each sequence's keys and values, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.reference.attention import attention


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
    """What `bertgpt.ops.paged_attention` computes; the arguments are described there.

    Returns:
        out like q, and with `return_lse` the float32 log-sum-exp, [H, T].
    """
    starts = range(len(lengths) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    outs, lses = [q[:0].detach()], [q.new_empty((q.shape[1], 0), dtype=torch.float32)]
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            q_1LHD = q[starts[b] : starts[b + 1]].unsqueeze(0)
            k_1SKD = _gather(k_pages, page_table[b], length).unsqueeze(0)
            v_1SKD = _gather(v_pages, page_table[b], length).unsqueeze(0)
            out, lse = attention(
                q_1LHD, k_1SKD, v_1SKD, causal=causal, window=window, scale=scale, return_lse=True
            )
            outs.append(out[0])
            lses.append(lse[0])
        out_THD, lse_HT = torch.cat(outs), torch.cat(lses, dim=1)
    return (out_THD, lse_HT) if return_lse else out_THD


def _gather(pages_PKND: Tensor, page_ids: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the sequence that lies in these pages, [S, K, D]."""
    page_size = pages_PKND.shape[2]
    position = torch.arange(length, device=page_ids.device)
    return pages_PKND[page_ids[position // page_size].long(), :, position % page_size]
