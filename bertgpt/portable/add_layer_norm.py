"""LayerNorm(dropout(x) + residual) on torch's own layer norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    # One dtype for torch's layer norm: float32 where the weight is, and for gradients on a CPU,
    # where torch would sum a bfloat16 weight's gradient in low precision.
    wide = weight.dtype
    if total.device.type == "cpu" and (total.requires_grad or weight.requires_grad):
        wide = torch.promote_types(wide, torch.float32)
    bias = None if bias is None else bias.to(wide)
    y = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias, eps).to(x.dtype)
    return (y, total) if return_sum else y
