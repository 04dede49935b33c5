"""LayerNorm(dropout(x) + residual) on torch's own layer norm."""

from __future__ import annotations

from collections.abc import Collection

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
    total = _total(x, residual, dropout_p, seed)
    wide = weight.dtype  # one dtype for torch's layer norm: float32 where the weight is
    bias = None if bias is None else bias.to(wide)
    y = F.layer_norm(total.to(wide), weight.shape, weight, bias, eps).to(x.dtype)
    return (y, total) if return_sum else y


def add_layer_norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    wanted: Collection[str],
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients by name of the inputs that are wanted; the sum and its statistics are made again.

    All in float32 at least: torch would sum a bfloat16 weight's gradient in low precision.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total, scale = _total(x, residual, dropout_p, seed).to(wide), weight.to(wide)
    shift = None if bias is None else bias.to(wide)
    _, mean, rstd = torch.native_layer_norm(total, weight.shape, scale, shift, eps)
    asked = ["x" in wanted or "residual" in wanted, "weight" in wanted, "bias" in wanted]
    grad_total, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide), total, weight.shape, mean, rstd, scale, shift, asked
    )
    made = {"weight": grad_weight, "bias": grad_bias}
    made = {name: gradient.to(weight.dtype) for name, gradient in made.items() if name in wanted}
    if asked[0]:
        grad_total = (grad_total if grad_sum is None else grad_total + grad_sum).to(x.dtype)
        made["residual"] = grad_total
        made["x"] = dropout_rows(grad_total, dropout_p, seed)
    return {name: made[name] for name in wanted}


def _total(
    x: Tensor, residual: Tensor | None, dropout_p: float, seed: int | Tensor | None
) -> Tensor:
    total = dropout_rows(x, dropout_p, seed)
    return total if residual is None else total + residual
