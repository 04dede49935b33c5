"""LayerNorm(dropout(x) + residual) on torch's own layer norm."""

from __future__ import annotations

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
    # Float32 weights beside half tensors: torch's layer norm wants one dtype, the wider one.
    bias = None if bias is None else bias.to(weight.dtype)
    y = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)
    return (y, total) if return_sum else y
