"""A peer that nobody ships whole: stock BERT's weights on packed tokens, with torch's varlen_attn.

What a careful user writes today: no padding anywhere, queries, keys and values from one product,
the layers compiled by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnpaddedBert(nn.Module):
    """The encoder of a stock `BertModel`, sharing its weights.

    Args:
        stock: transformers' BertModel in inference mode.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.embeddings, self.layers = stock.embeddings, stock.encoder.layer
        self.qkv = nn.ModuleList(_fused(layer.attention.self) for layer in self.layers)
        self.heads: int = stock.config.num_attention_heads

    def forward(self, values: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states `[T, E]` of word ids and positions `[T]`; `attend` takes `[T, H, D]`."""
        tables = self.embeddings
        x = tables.word_embeddings(values) + tables.token_type_embeddings.weight[0]
        x = tables.LayerNorm(x + tables.position_embeddings(positions))
        for layer, qkv in zip(self.layers, self.qkv, strict=True):
            q, k, v = qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
            mixed = layer.attention.output.dense(attend(q, k, v).flatten(1))
            x = layer.attention.output.LayerNorm(mixed + x)
            inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(layer.output.dense(inner) + x)
        return x


def _fused(attention: Any) -> nn.Linear:
    """The three projections of stock self-attention as one."""
    parts = (attention.query, attention.key, attention.value)
    weight = torch.cat([part.weight for part in parts]).detach()
    rows, width = weight.shape
    fused = nn.Linear(width, rows, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        fused.weight.copy_(weight)
        fused.bias.copy_(torch.cat([part.bias for part in parts]))
    return fused


def positions_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Each packed token's place in its sequence, int64 [T], without a synchronisation."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts


def varlen(cu_seqlens: Tensor, longest: int) -> Attend:
    """The attention of torch over packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out

    return attend


def by_sequence(cu_seqlens: Tensor) -> Attend:
    """The same by SDPA, a sequence at a time: where varlen_attn does not run."""
    bounds = cu_seqlens.tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for start, stop in pairwise(bounds):
            one_q, one_k, one_v = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(one_q, one_k, one_v).transpose(0, 1))
        return torch.cat(parts)

    return attend
