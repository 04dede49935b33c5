"""LayerNorm(dropout(x) + residual) by its definition.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016, equations 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bertgpt.philox import dropout_rows


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `bertgpt.ops.add_layer_norm` computes; the arguments are described there."""
    total = dropout_rows(x, dropout_p, seed)
    if residual is not None:
        total = total + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))  # statistics in float32 at least
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)  # biased: divided by E
    y = centred / torch.sqrt(variance + eps) * weight
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    return (y, total) if return_sum else y
